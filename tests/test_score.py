"""The score and its validation: differences by plain loops, SAEs spoiled on purpose, intervals that cover."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sage_nb.core.activations import capture
from sage_nb.report.evaluation import saes_hash, task_hash
from sage_nb.core.intervals import resample_counts
from sage_nb.saes.sets import load_saes
from sage_nb.saes.baselines import supervised_as_sae
from sage_nb.measures.score import Evidence, compare, sage_score, score_parts
from sage_nb.report.validation import LADDERS, interval_coverage, ladder

KS = (1, 4)


def made_up(seed, n=60, section="IO:z@END"):
    "Evidence of all three tests, with numbers of the right kinds."
    g = torch.Generator().manual_seed(seed)
    clean, ablated = 4 + torch.randn(n, generator=g), torch.randn(n, generator=g)
    put_in, left_out = 0.7 * clean + 0.3 * torch.randn(n, generator=g), 0.2 * clean
    success, floor, sky = ((torch.rand(n, k, generator=g) < p).float() for k, p in ((2, 0.5), (1, 0.05), (1, 0.95)))
    wanted = torch.rand(n, 1, generator=g) + 1
    control = torch.cat([success, 0.5 * wanted.expand(n, 2), torch.rand(n, 2, generator=g), floor, sky, 0.9 * wanted, torch.rand(n, 1, generator=g), wanted], 1)
    value = torch.randint(4, (n,), generator=g)
    holds = torch.nn.functional.one_hot(value, 4).float()
    on = (holds + (torch.rand(n, 4, generator=g) < 0.2)).clamp(max=1)
    coverage = torch.stack([on * holds, on, holds], 2).flatten(1)
    return Evidence(section, torch.stack([clean, ablated, put_in, left_out], 1), control, coverage, "success", KS)


def plain_parts(e, rows):
    "The four parts from the prompts themselves, one number at a time."
    clean, ablated, put_in, left_out = (sum(float(e.test_1[i, c]) for i in rows) / len(rows) for c in range(4))
    success = [sum(float(e.control[i, c]) for i in rows) / len(rows) for c in (0, 1)]
    floor, sky = (sum(float(e.control[i, c]) for i in rows) / len(rows) for c in (6, 7))
    normal = [min(max((s - floor) / (sky - floor), 0), 1) for s in success]
    f1 = []
    for v in range(e.coverage.shape[1] // 3):
        both, on, holds = (sum(float(e.coverage[i, 3 * v + c]) for i in rows) for c in range(3))
        if holds: f1.append(2 * both / (on + holds))
    parts = [(put_in - ablated) / (clean - ablated), 1 - abs(ablated - left_out) / abs(ablated - clean), sum(normal) / 2, np.mean([f >= 0.5 for f in f1])]
    return [min(max(p, 0), 1) for p in parts]


def test_score_and_parts_equal_a_plain_loop():
    some = [made_up(0), made_up(1, section="S:v@S2")]
    rows = range(60)
    expected = [plain_parts(e, rows) for e in some]
    assert_close(score_parts(some), torch.tensor(expected, dtype=torch.double), rtol=1e-6, atol=1e-6)
    assert sage_score(some).value == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_difference_and_its_interval_equal_a_plain_bootstrap():
    a, b, counts = [made_up(0)], [made_up(5)], resample_counts(60)[:40]
    found = []
    for count in counts:
        rows = [i for i, c in enumerate(count.tolist()) for _ in range(int(c))]
        found.append(np.mean(plain_parts(a[0], rows)) - np.mean(plain_parts(b[0], rows)))
    means = (counts @ torch.cat([a[0].columns, b[0].columns], 1)) / 60
    width = a[0].columns.shape[1]
    ours = score_parts(a, means[:, :width]).mean((-1, -2)) - score_parts(b, means[:, width:]).mean((-1, -2))
    assert ours.tolist() == pytest.approx(found, abs=1e-6)
    whole = compare(a, b).difference
    assert whole.lo <= whole.value <= whole.hi
    assert whole.value == pytest.approx(np.mean(plain_parts(a[0], range(60))) - np.mean(plain_parts(b[0], range(60))), abs=1e-6)


def test_prompts_that_cannot_be_edited_do_not_count_in_controllability():
    e, some = made_up(2), torch.arange(60) % 3 != 0
    padded = replace(e, control=e.control * some[:, None])
    alone = replace(e, test_1=e.test_1[some], control=e.control[some], coverage=e.coverage[some])
    assert_close(score_parts([padded])[0, 2], score_parts([alone])[0, 2])


def test_an_undefined_part_is_left_out_for_both():
    a, b = ([replace(made_up(s), measure=None)] for s in (0, 1))
    assert score_parts(a).isnan().tolist() == [[False, False, True, False]]
    assert "controllability" not in compare(a, b).parts and sage_score(a).value == pytest.approx(score_parts(a).nanmean().item())


def test_intervals_cover_a_planted_score():
    population = [made_up(s, n=8000, section=str(s)) for s in (0, 1)]
    coverage = interval_coverage(population, n=128, repeats=300)
    assert coverage.loc["score", "coverage"] >= 0.92 and coverage.loc["score", "coverage"] <= 0.98
    too_narrow = interval_coverage([replace(e, test_1=e.test_1[:40], control=e.control[:40], coverage=e.coverage[:40]) for e in population], n=4, repeats=60)
    assert too_narrow.loc["fraction recovered", "coverage"] < 0.95  # four prompts are too few for a bootstrap, and it shows


# Ladders

@pytest.fixture(scope="module")
def rungs(task, sections, truth):
    nodes = sections[0].nodes
    return nodes, {how: ladder(truth, nodes, how) for how in LADDERS}


def test_the_first_rung_is_the_dictionary_and_the_last_is_not(model, task, truth, rungs):
    nodes, ladders = rungs
    for node in nodes:
        x = capture(model, task.test.prompts, [node])[node]
        whole = supervised_as_sae(truth[node], node).reconstruct(x)
        for how, sets in ladders.items():
            assert_close(sets[0].find(node).reconstruct(x), whole)
            error = [(s.find(node).reconstruct(x) - whole).norm().item() for s in sets]
            if how == "split": assert max(error) <= 1e-4 * whole.norm()
            else: assert error == sorted(error) and error[-1] > 0.3 * (whole - truth[node].mean).norm()
        assert_close(ladders["dropped"][-1].find(node).reconstruct(x), truth[node].mean.expand_as(x))


def test_splitting_and_merging_change_how_many_latents_fire(model, task, rungs):
    node, ladders = rungs[0][0], rungs[1]
    x = capture(model, task.test.prompts, [node])[node]
    fired = {how: [len(s.find(node).encode(x).indices.unique()) for s in sets] for how, sets in ladders.items() if how in ("split", "merged")}
    assert fired["split"] == sorted(fired["split"]) and fired["split"][-1] > 3 * fired["split"][0]
    assert fired["merged"] == sorted(fired["merged"], reverse=True) and fired["merged"][-1] < 0.5 * fired["merged"][0]


# Hashes

def test_hashes_tell_tasks_and_saes_apart(task, sae_sets):
    tokens = task.prompts.tokens.clone()
    tokens[0, 3] += 1
    assert task_hash(task) == task_hash(task[:]) != task_hash(replace(task, prompts=replace(task.prompts, tokens=tokens)))
    saes = load_saes("tiny-gpt2-res-topk")
    first = next(iter(saes))
    assert saes_hash(saes) == saes_hash(load_saes("tiny-gpt2-res-topk")) != saes_hash(replace(saes, saes=saes.saes | {first.node: replace(first, b_dec=first.b_dec + 1e-3)}))
