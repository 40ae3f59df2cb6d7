"""What holds of each family of models: how far this library is from transformers' own modules and hooks.

Two-layer models with random weights, of transformers' own configuration and model classes, written to a folder and
loaded from it. Two tables for each class of TransformerLens.

Distances, on four prompts of twelve tokens, longer than the sliding windows. A figure is the largest difference, as a
share of the largest value (of q to mlp_out: a distance, as a share of the length), about 1e-7 where nothing is wrong.
"QK fix" is against patterns that move in real runs and slopes of transformers' own graph. The last two columns are
distances from exact patching, which no slope has at 0. A "-" is refused with a reason (queries that stand beside
gates), or a site of which nothing is claimed; heads that are gated are as far off as is shown.

What a user does, with a tokenizer of the family's kind (trained on the tasks' words, without some rare ones). "doctor",
its checks that are ok, and which are not. "tasks", the built-in ones that can be made, of eight. "evaluate", all three
tests of identities in the stream at k, v, z, attn_out and mlp_out (where heads are gated: k, v and the stream), on a
task whose answers are the model's own: how far the fraction recovered is from 1, in the worst of the "sections" that
count. "seconds", CPU, of all figures of the family.
"""
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import pandas as pd
from families import CHECKED, CONFIGS, HOOKED, contrast, evaluated, make, make_reader, off, off_evaluated
from families import off_exact, off_fixed, off_identity, off_pattern, off_recomputed
from transformers.utils.logging import disable_progress_bar

from sage_nb.core.attention import UnknownAttention
from sage_nb.core.doctor import doctor
from sage_nb.tasks.builtin import RECIPES
from sage_nb.tasks.task import load_task

def or_refused(measure, *args):
    "What is measured, or None where it is refused for what the model's attention is."
    try: return measure(*args)
    except UnknownAttention: return None


def distances(family, kind):
    "How far one family in one class is from transformers."
    made = make(family)
    model, tokens = getattr(made, kind), contrast().prompts.tokens
    logits = off(model(tokens).log_softmax(-1), made.theirs(tokens).logits.log_softmax(-1))
    by_hand, fixed, plain = or_refused(off_fixed, family, kind) or (None, None, None)
    recomputed = None if by_hand is None else off_recomputed(model)
    return {
        "logits": logits, "exact patching": off_exact(made, model), **{site: None for site in CHECKED},
        **off_identity(model),
        "pattern": or_refused(off_pattern, made, model), "z, recomputed": recomputed, "QK fix": by_hand,
        "QK fix - exact": fixed, "slope - exact": plain}


def well(model):
    "What the doctor says."
    checks = [check for check in doctor(model).checks if check.verdict != "not applicable"]
    wrong = [check.name for check in checks if check.verdict != "ok"]
    return f"{len(checks) - len(wrong)}/{len(checks)}" + (f", not {', '.join(wrong)}" if wrong else "")


def is_made(name, model):
    try: load_task(name, model, n=24)
    except ValueError: return False
    return True


def use(family, kind):
    "What a user meets of one family in one class."
    model = getattr(make_reader(family), kind)
    report = evaluated(model)
    return {"doctor": well(model), "tasks": sum(is_made(name, model) for name in RECIPES),
            "evaluate": off_evaluated(report), "sections": f"{report.sections.counts.sum()} of {len(report.sections)}"}


def shown(column):
    "A column as text: seconds and distances from exact patching as numbers, errors by their size."
    form = "{:.1f}" if column.name == "seconds" else "{:.2f}" if " - " in column.name else "{:.0e}"
    return ["-" if pd.isna(x) else form.format(x) if isinstance(x, float) else str(x) for x in column]


def rows(families, kind):
    "Both tables of a class, and the CPU seconds of each family."
    far, met = {}, {}
    for family in families:
        start = time.process_time()
        far[family], met[family] = distances(family, kind), use(family, kind)
        met[family]["seconds"] = time.process_time() - start
    return far, met


if __name__ == "__main__":
    disable_progress_bar()
    kinds = {"TransformerBridge": ("bridge", CONFIGS), "HookedTransformer": ("hooked", HOOKED)}
    for name, (kind, families) in kinds.items():
        print(f"\n{name}")
        for table in rows(families, kind): print(pd.DataFrame(table).T.apply(shown).to_string(), "\n")
