"""Which words of the eight tasks are left for a tokenizer of each kind, or why there is no task.

The tokenizers are those of `tests/tokenizer_kinds.py`: small, trained on the tasks' words without some rare ones. The
real GPT-2's is added where $SAGE_NB_DATA/gpt2_tokenizer holds its vocab.json and merges.txt. A cell is the number of
words left of each list, with words of one token and whole answers; where that is too few, the reason, and below it
what is left with words of any number of tokens, and answers compared by their first.

python benchmarks/words_left.py [--quick]
"""
import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tokenizer_kinds import KINDS
from transformers import GPT2TokenizerFast

from sage_nb.tasks.builtin import RECIPES
from sage_nb.tasks.task import load_task

LONGER = {"word_tokens": None, "answers": "first"}


def tokenizers(quick):
    "A tokenizer of each kind by name."
    kinds = list(KINDS.items())[:3] if quick else KINDS.items()
    made = {name: make() for name, make in kinds}
    folder = Path(os.environ.get("SAGE_NB_DATA", "")) / "gpt2_tokenizer"
    if (folder / "vocab.json").exists(): return {"GPT-2 itself": GPT2TokenizerFast.from_pretrained(folder)} | made
    return made


def left(tokenizer, name, **rules):
    "What is left of a task's words, and whether there is a task."
    like = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(default_prepend_bos=False))
    try: task = load_task(name, like, n=24, **rules)
    except ValueError as error: return f"no task: {error}", False
    lengths = {role: n for role, n in task.notes["tokens of words"].items() if n != [1]}
    words = "; ".join(f"{kind} {n}" for kind, n in task.notes["usable words"].items())
    return words + (f"; tokens of words {lengths}" if lengths else ""), True


def main(quick):
    warnings.simplefilter("ignore")
    for kind, tokenizer in tokenizers(quick).items():
        start = time.process_time()
        print(f"\n{kind}")
        for name in RECIPES:
            said, works = left(tokenizer, name)
            print(f"  {name:<13} {said}")
            if not works: print(f"  {'':<13} longer words: {left(tokenizer, name, **LONGER)[0]}")
        print(f"  ({time.process_time() - start:.1f} s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three kinds")
    main(parser.parse_args().quick)
