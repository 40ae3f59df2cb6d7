"""The battery, small: what must hold of a dozen attacks on agreement in tiny-gpt2, and what failures look like."""
import pandas as pd
import pytest
import torch

from sage_nb.core.intervals import Estimate
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.report.battery import PLANTED, TRAINED, Expectation, Material, attacks, battery
from sage_nb.saes.sets import load_saes
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import fit_dictionaries

INVARIANT = ("planted, leaking", "planted, rescaled", "planted, permuted", "planted, with dead copies",
             "trained, leaking", "trained, permuted")
DAMAGED = ("dropped 1", "split in 2 by coin", "with live copies", "joint", "one node", "rotated ±")
EMPTY = ("misnamed", "all prompts", "all prompts, labels of 0.0001", "random, L0 4")
EVERY = (*INVARIANT, *DAMAGED, *EMPTY)


@pytest.fixture(scope="module")
def ground(model):
    task = load_task("agreement", model, n=192)
    sections = find_cross_sections(model, task, "number", sites=["z", "v"], max_prompts=48, verbose=False)
    return model, task, sections, fit_dictionaries(model, task, sections), load_saes("tiny-gpt2-res-topk")


@pytest.fixture(scope="module")
def found(ground): return battery(*ground, only=EVERY, diagnostics=False, progress=False)


@pytest.mark.parametrize("attack", EVERY)
def test_what_must_hold_of_an_attack_holds(found, attack):
    rows = found.table[found.table.attack == attack]
    assert len(rows) or any(relation.startswith(attack) for relation in found.unasked)
    assert rows.holds.all(), rows.to_string()


def test_the_table_is_made_of_the_report(found):
    card = found.report.scorecard()
    for row in found.table.itertuples():
        if "where sections tell" in row.expected: continue
        assert row.score == pytest.approx(card.score[row.attack], abs=1e-9)
        assert row.difference == pytest.approx(row.score - row.other, abs=1e-9)
    assert card.score[PLANTED] == pytest.approx(1, abs=0.02)
    assert card.score[TRAINED] > card.score["random, L0 4"]


def test_without_older_tests_version_1_is_not_known(found):
    assert found.table["version 1"].isna().all() and not found.table["held before"].any()


def test_every_attack_leaves_what_it_spoils_as_it_was(ground):
    material = Material(*ground)
    before = {node: sae.reconstruct(material.acts[node]) for node, sae in material.planted.saes.items()}
    list(attacks(material))
    for node, sae in material.planted.saes.items():
        assert torch.equal(sae.reconstruct(material.acts[node]), before[node])


@pytest.mark.parametrize("relation,a,b,interval,holds", [
    ("1", 0.981, None, (0, 0, 0), True), ("1", 0.979, None, (0, 0, 0), False), ("1", 1.021, None, (0, 0, 0), False),
    ("the same", 0.5, 0.504, (-0.004, -0.2, 0.2), True), ("the same", 0.5, 0.506, (-0.006, -0.2, 0.2), False),
    ("below", 0.5, 0.6, (-0.1, -0.2, -0.01), True), ("below", 0.5, 0.6, (-0.1, -0.2, 0.0), False),
    ("not above", 0.6, 0.5, (0.1, 0.0, 0.2), True), ("not above", 0.6, 0.5, (0.1, 0.01, 0.2), False),
    ("at most", 0.5, 1.0, (-0.5, -0.6, -0.4), True), ("at most", 0.51, 1.0, (-0.49, -0.6, -0.4), False),
])
def test_a_relation_holds_up_to_its_limit_and_no_further(relation, a, b, interval, holds):
    other = a if b is None else b
    assert Expectation(relation, "b" if b else None, 0.5).holds(a, other, Estimate(*interval, 64)) is holds


def test_a_failing_relation_is_shown(found):
    broken = found.table.assign(holds=found.table.index != 0)
    shown = type(found)(found.report, broken, found.unasked)
    assert len(shown.failing) == 1 and shown.held == pytest.approx(1 - 1 / len(broken))
    assert f"{len(broken) - 1} of {len(broken)} relations hold" in str(shown)
    assert isinstance(shown.failing, pd.DataFrame) and shown.failing.attack.iloc[0] == broken.attack.iloc[0]
