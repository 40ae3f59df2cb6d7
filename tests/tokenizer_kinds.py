"""Tokenizers of each kind that language models have, small: trained here on the words of the built-in tasks.

The words of `RARE` are not in the text that they are trained on, so that some words are several tokens for each.
"""
from functools import cache

from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sage_nb.core.models import load_model
from sage_nb.lab.zoo import sentences
from sage_nb.tasks.builtin import CENTURIES, RECIPES, YEARS

RARE = {"Karen", "Henry", "Rachel", "hospital", "library", "gift", "Hungary", "Portugal", "doctors", "glass", "strike"}
TIKTOKEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+")  # how Llama 3 (three digits) and Qwen (one) split a text
CHAT = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"


@cache
def corpus():
    "Sentences of the zoo, and each word and each year a few times, without the rare words."
    text = sentences(seed=0)
    lines = [next(text) for _ in range(4000)]
    words = {w for r in RECIPES.values() for entries in r.lexicon.values() for e in entries
             for w in ([e] if isinstance(e, str) else e)}
    lines += [f"the {word} and {word.title()}" for word in sorted(words) for _ in range(5)]
    lines += [f"in {century}{year} to" for century in CENTURIES for year in YEARS]
    return [" ".join(w for w in line.split(" ") if w.strip(".,:") not in RARE) for line in lines]
