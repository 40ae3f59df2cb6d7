"""What holds of each family of models: how far this library is from transformers' own modules and hooks.

Two-layer models with random weights, of transformers' own configuration and model classes, written to a folder and
loaded from it; four prompts of twelve tokens, longer than the sliding windows. A figure is the largest difference, as a
share of the largest value (of q to mlp_out: a distance, as a share of the length), about 1e-7 where nothing is wrong.
"QK fix" is against patterns that move in real runs and slopes of transformers' own graph. The two columns before the
seconds are distances from exact patching, which no slope has at 0. A "-" is refused with a reason (queries that stand
beside gates), or a site of which nothing is claimed; heads that are gated are as far off as is shown.
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
from families import CHECKED, CONFIGS, HOOKED, contrast, make, off, off_exact, off_fixed, off_identity, off_pattern
from families import off_recomputed
from transformers.utils.logging import disable_progress_bar

from sage_nb.core.attention import UnknownAttention


def or_refused(measure, *args):
    "What is measured, or None where it is refused for what the model's attention is."
    try: return measure(*args)
    except UnknownAttention: return None


def row(family, kind):
    "All figures of one family in one class, and the seconds that they took."
    made, start = make(family), time.perf_counter()
    model, tokens = getattr(made, kind), contrast().prompts.tokens
    logits = off(model(tokens).log_softmax(-1), made.theirs(tokens).logits.log_softmax(-1))
    by_hand, fixed, plain = or_refused(off_fixed, family, kind) or (None, None, None)
    recomputed = None if by_hand is None else off_recomputed(model)
    figures = {
        "logits": logits, "exact patching": off_exact(made, model), **{site: None for site in CHECKED},
        **off_identity(model),
        "pattern": or_refused(off_pattern, made, model), "z, recomputed": recomputed, "QK fix": by_hand,
        "QK fix - exact": fixed, "slope - exact": plain}
    return figures | {"seconds": time.perf_counter() - start}


def shown(column):
    "A column as text: seconds and distances from exact patching as numbers, errors by their size."
    form = "{:.1f}" if column.name == "seconds" else "{:.2f}" if " - " in column.name else "{:.0e}"
    return ["-" if pd.isna(x) else form.format(x) for x in column]


if __name__ == "__main__":
    disable_progress_bar()
    kinds = {"TransformerBridge": ("bridge", CONFIGS), "HookedTransformer": ("hooked", HOOKED)}
    for name, (kind, families) in kinds.items():
        table = pd.DataFrame({family: row(family, kind) for family in families}).T
        print(f"\n{name}\n{table.apply(shown).to_string()}")
