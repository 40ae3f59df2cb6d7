"""Tokenizers of each kind that language models have, small: trained here on the words of the built-in tasks.

The words of `RARE` are not in the text that they are trained on, so some words are several tokens for each of them.
"""
import json
import re
from functools import cache
from itertools import islice
from string import ascii_letters

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sage_nb.core.models import load_model
from sage_nb.lab.zoo import sentences
from sage_nb.tasks.builtin import CENTURIES, RECIPES

RARE = set("""Karen Henry Rachel Daniel Julia Simon Susan Kevin hospital library station church gift Hungary Portugal
Budapest Lisbon doctor doctors glass strike third""".split())
TIKTOKEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+")  # how Llama 3 (up to three digits a token) and Qwen (one) split a text
CHAT = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
SIZE = 3000  # words of a vocabulary, at most
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _words_of(entry): return [entry] if isinstance(entry, str) else list(entry)


@cache
def corpus():
    "Sentences, and each word and year a few times, without the rare words."
    text = sentences(seed=0)
    lines = [line for line in islice(text, 1500) if not any(map(str.isdigit, line))]
    words = {w for r in RECIPES.values() for entries in r.lexicon.values() for e in entries for w in _words_of(e)}
    lines += [f"the {word} and" for word in sorted(words) for _ in range(20)]
    lines += [f"the {letter} and" for letter in ascii_letters for _ in range(5)]
    lines += [f"in {century} to" for century in CENTURIES for _ in range(20)]
    lines += [f"a{year:02d} in" for year in range(100) for _ in range(20)]
    return [" ".join(w for w in line.split(" ") if w.strip(".,:") not in RARE) for line in lines]


def trained(tokenizer, trainer, more=(), **special):
    tokenizer.train_from_iterator([*corpus(), *more], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _bpe_trainer(size=SIZE, **options):
    return trainers.BpeTrainer(vocab_size=size, min_frequency=3, show_progress=False, **options)


def _byte_pairs(split, special):
    "Bytes, as GPT-2 writes them, after a split by `split`."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, _bpe_trainer(special_tokens=special, initial_alphabet=alphabet)


def gpt2():
    end = "<|endoftext|>"
    made = _byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=False), [end])
    return trained(*made, bos_token=end, eos_token=end, unk_token=end)


def _tiktoken(digits, special):
    split = pre_tokenizers.Split(Regex(TIKTOKEN % digits), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_pairs(pre_tokenizers.Sequence([split, as_bytes]), special)


def llama3():
    "Like that of a chat model: <|begin_of_text|> is put before every text, and there is a template of turns."
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer, trainer = _tiktoken("1,3", special)
    tokenizer.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", None, [(special[0], 0)])
    numbers = [f"a{i:03d}" for i in range(1000) for _ in range(3)]  # each is a token
    return trained(tokenizer, trainer, numbers, bos_token=special[0], eos_token=special[1], chat_template=CHAT)


def qwen():
    "No <bos>, and every digit is a token."
    return trained(*_tiktoken("1", ["<|endoftext|>"]), eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@cache
def _sentencepiece():
    "Words and merges in the manner of SentencePiece, with a token for each digit and, as a fallback, for each byte."
    tokenizer = Tokenizer(models.BPE())
    space, digits = pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([space, digits, pre_tokenizers.Punctuation()])
    tokenizer.train_from_iterator(corpus(), _bpe_trainer())
    model = json.loads(tokenizer.to_str())["model"]
    words = ["<unk>", "<bos>", "<eos>", "<pad>", *BYTES, *sorted(model["vocab"], key=model["vocab"].get)]
    return {word: i for i, word in enumerate(words)}, [tuple(merge) for merge in model["merges"]]


def _pieces(normalizer=None, pre_tokenizer=None, **special):
    vocabulary, merges = _sentencepiece()
    model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    if normalizer: tokenizer.normalizer = normalizer
    if pre_tokenizer: tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    template = processors.TemplateProcessing("<bos> $A", None, [("<bos>", vocabulary["<bos>"])])
    tokenizer.post_processor = template
    special = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def llama2():
    "SentencePiece that puts `▁` before every text, in the normalizer."
    return _pieces(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def metaspace():
    "SentencePiece that puts `▁` before every text, in the splitting."
    return _pieces(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"))


def without_prefix():
    "SentencePiece that puts nothing before a text."
    return _pieces(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"))


def gemma():
    "SentencePiece with nothing before a text, and padding on the left."
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    return _pieces(normalizers.Replace(" ", "▁"), split, pad_token="<pad>", padding_side="left")


def unigram():
    "A unigram model, a score for each word, each letter and some endings, with `▁` before every text, and no <bos>."
    words = {f"▁{word}" for line in corpus() for word in re.findall(r"[A-Za-z]+|\d\d", line)}
    letters = {letter for line in corpus() for letter in line.replace(" ", "▁")}
    years = {f"{year:02d}" for year in range(100)}
    scores = [("<unk>", 0.0), ("</s>", 0.0)]
    scores += [(piece, -9.0) for piece in sorted(words | years)] + [(piece, -8.0) for piece in sorted(letters - words)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def wordpiece():
    "Like BERT's: no spaces, no capital letters, no accents; [CLS] before and [SEP] behind every text."
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    trainer = trainers.WordPieceTrainer(vocab_size=SIZE, min_frequency=3, show_progress=False, special_tokens=special)
    return trained(tokenizer, trainer, unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]")


def superwords():
    "Merges across spaces, as if `to the` were a word."
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    trainer = _bpe_trainer(special_tokens=["<unk>", "<bos>"])
    return trained(tokenizer, trainer, unk_token="<unk>", bos_token="<bos>")


def characters():
    "Every letter is a token."
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = _bpe_trainer(1, special_tokens=["<unk>", "<bos>"])
    return trained(tokenizer, trainer, unk_token="<unk>", bos_token="<bos>")


KINDS = {make.__name__: make for make in (
    gpt2, llama3, qwen, llama2, metaspace, without_prefix, gemma, unigram, wordpiece, superwords, characters)}
WITHOUT_BOS = {"gpt2", "qwen", "unigram"}  # all others begin with <bos>
BOS = set(KINDS) - WITHOUT_BOS


def save_model(folder, tokenizer):
    "A tiny GPT-2 with random weights that reads with the tokenizer, as a folder."
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_of(kind, folder):
    "A model with a tokenizer of the kind, loaded from its folder."
    model = load_model(save_model(folder, KINDS[kind]()))
    model.cfg.default_prepend_bos = kind in BOS
    return model
