"""How long the playground's controls take to answer on tiny-gpt2, with the model on one thread.

Every control is moved many times, to a place where it has not been before, so that nothing is remembered.
Seconds are of the clock and of this process's processor; on a busy machine only the latter say something.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import random
import time

import pandas as pd
import torch

from sage_nb.core.models import load_model
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import fit_dictionaries
from sage_nb.views.playground import Playground, playground

SETS = ["tiny-gpt2-res-topk", "tiny-gpt2-res-standard"]
BAR = 0.3  # seconds


def moves(play: Playground, rng: random.Random):
    "(control, where it goes) until every one has been moved some thirty times; new prompts are the dearest."
    texts = [text for _, text in play.prompts.options if text]
    names = sorted(play.player.task.train.attributes["IO"].unique())
    for text in texts[:30]:
        yield "prompts", text
        yield "sae", rng.choice([name for name in SETS if name != play.sae.value])
        yield "section", rng.choice([name for name in play.section.options if name != play.section.value])
        yield "value", rng.choice([value for value in play.value.options if value != play.value.value])
        yield "k", rng.choice([k for k in range(33) if k != play.k.value])
        one, other = rng.sample(names, 2)
        yield "text", f"When {one} and {other} went to the park, {other} gave a {rng.choice(['hat', 'pen', 'key'])} to"


def timed(play: Playground) -> pd.DataFrame:
    "One row per move."
    rows = []
    for control, goal in moves(play, random.Random(0)):
        clock, processor = time.perf_counter(), time.process_time()
        setattr(getattr(play, control), "value", goal)
        took = time.perf_counter() - clock, time.process_time() - processor
        assert not play.message.value, play.message.value
        rows.append((control, *took))
    return pd.DataFrame(rows, columns=["control", "clock", "processor"])


def main():
    torch.set_num_threads(1)
    model = load_model("tiny-gpt2")
    task = load_task("ioi", model, n=384)
    sections = find_cross_sections(model, task, max_prompts=64, verbose=False)
    truth = fit_dictionaries(model, task, sections)
    play = playground(model, task, truth, SETS, sections)
    table = timed(play)
    by = table.groupby("control", sort=False)[["clock", "processor"]].agg(["count", "median", "max"])
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread; bar {BAR} s")
    print(by.drop(columns=[("processor", "count")]).round(3).to_string())
    print(f"all moves: median {table.clock.median():.3f} s, worst {table.clock.max():.3f} s of the clock; "
          f"{table.processor.median():.3f} and {table.processor.max():.3f} s of the processor")


if __name__ == "__main__": main()
