"""The score and its validation: differences by plain loops, SAEs spoiled on purpose, intervals that cover."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sage_nb.core.activations import capture
from sage_nb.core.intervals import each, resample_counts, resampled_means
from sage_nb.measures.control import ControlEvidence
from sage_nb.measures.faithfulness import Runs
from sage_nb.measures.interpretability import Hits
from sage_nb.measures.score import Evidence, compare, mean_of_parts, sage_score, score_parts
from sage_nb.report.validation import LADDERS, coverage_of_sets, distinct_rows, interval_coverage, ladder
from sage_nb.saes.baselines import supervised_as_sae
from sage_nb.saes.sets import load_saes
from sage_nb.truth.runs import Edit

KS = (1, 4)


def made_up_control(g, n):
    "Test 2, with edits that succeed in half of the prompts and a skyline that nearly always does."
    success, floor, skyline = ((torch.rand(n, k, generator=g) < p).float() for k, p in ((2, 0.5), (1, 0.05), (1, 0.95)))
    wanted = torch.rand(n, 1, generator=g) + 1
    removed, skyline_removed = torch.rand(n, 2, generator=g), torch.rand(n, 1, generator=g)
    return ControlEvidence(
        edits=Edit(success, 0.5 * wanted.expand(n, 2)), removed=removed,
        floor=Edit(floor, torch.zeros(n, 1)), skyline=Edit(skyline, 0.9 * wanted), skyline_removed=skyline_removed,
        target=Edit(torch.ones(n, 1), wanted))


def made_up(seed, n=60, section="IO:z@END"):
    "Evidence of all three tests, with numbers of the right kinds."
    g = torch.Generator().manual_seed(seed)
    clean, ablated = 4 + torch.randn(n, generator=g), torch.randn(n, generator=g)
    runs = Runs(clean, ablated, 0.7 * clean + 0.3 * torch.randn(n, generator=g), 0.2 * clean)
    control = made_up_control(g, n)
    value = torch.randint(4, (n,), generator=g)
    holds = torch.nn.functional.one_hot(value, 4).bool()
    on = holds | (torch.rand(n, 4, generator=g) < 0.2)
    return Evidence(section, runs, control, Hits.of(on, holds), "success", KS)


def plain_parts(e, rows):
    "The four parts from the prompts themselves, one number at a time."
    clean, ablated, put_in, left_out = (sum(float(run[i]) for i in rows) / len(rows) for run in e.runs)

    def share(edit, k): return sum(float(edit.success[i, k]) for i in rows) / len(rows)
    success = [share(e.control.edits, k) for k in (0, 1)]
    floor, skyline = share(e.control.floor, 0), share(e.control.skyline, 0)
    normal = [min(max((s - floor) / (skyline - floor), 0), 1) for s in success]
    f1 = []
    for v in range(e.coverage.holds.shape[1]):
        both, on, holds = (sum(float(hits[i, v]) for i in rows) for hits in e.coverage)
        if holds: f1.append(2 * both / (on + holds))
    parts = [
        (put_in - ablated) / (clean - ablated), 1 - abs(ablated - left_out) / abs(ablated - clean),
        sum(normal) / 2, np.mean([f >= 0.5 for f in f1])]
    return [min(max(p, 0), 1) for p in parts]


def test_score_and_parts_equal_a_plain_loop():
    evidence = [made_up(0), made_up(1, section="S:v@S2")]
    expected = [plain_parts(e, range(60)) for e in evidence]
    assert_close(score_parts(evidence), torch.tensor(expected, dtype=torch.double), rtol=1e-6, atol=1e-6)
    assert sage_score(evidence).value == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_difference_and_its_interval_equal_a_plain_bootstrap():
    a, b, expected = made_up(0), made_up(5), []
    for count in resample_counts(60)[:40].tolist():
        rows = [i for i, times in enumerate(count) for _ in range(int(times))]
        expected.append(np.mean(plain_parts(a, rows)) - np.mean(plain_parts(b, rows)))
    of_a, of_b = each(lambda x: x[:40], resampled_means([a.numbers, b.numbers]))
    ours = mean_of_parts(score_parts([a], [of_a])) - mean_of_parts(score_parts([b], [of_b]))
    assert ours.tolist() == pytest.approx(expected, abs=1e-6)
    whole, everything = compare([a], [b]).difference, range(60)
    assert whole.lo <= whole.value <= whole.hi
    difference = np.mean(plain_parts(a, everything)) - np.mean(plain_parts(b, everything))
    assert whole.value == pytest.approx(difference, abs=1e-6)


def test_evidence_of_some_prompts_is_that_of_those_rows():
    e, rows = made_up(3), torch.tensor([4, 4, 7, 0, 59])
    assert_close(score_parts([e.at(rows)])[0], torch.tensor(plain_parts(e, rows.tolist()), dtype=torch.double))
    mask = torch.arange(60) < 30
    assert_close(score_parts([e.at(mask)])[0], torch.tensor(plain_parts(e, range(30)), dtype=torch.double))


def test_prompts_that_cannot_be_edited_do_not_count_in_controllability():
    e, editable = made_up(2), torch.arange(60) % 3 != 0
    padded = replace(e, control=each(lambda x: x * editable[:, None], e.control))
    assert_close(score_parts([padded])[0, 2], score_parts([e.at(editable)])[0, 2])


def test_an_undefined_part_is_left_out_for_both():
    a, b = ([replace(made_up(s), measure=None)] for s in (0, 1))
    assert score_parts(a).isnan().tolist() == [[False, False, True, False]]
    assert "controllability" not in compare(a, b).parts
    assert sage_score(a).value == pytest.approx(score_parts(a).nanmean().item())


def test_intervals_cover_a_planted_score():
    population = [made_up(s, n=8000, section=str(s)) for s in (0, 1)]
    coverage = interval_coverage(population, n=128, repeats=300)
    assert 0.92 <= coverage.loc["score", "coverage"] <= 0.98
    too_narrow = interval_coverage([e.at(torch.arange(40)) for e in population], n=4, repeats=60)
    assert too_narrow.loc["fraction recovered", "coverage"] < 0.95  # four prompts are too few for a bootstrap: it shows


def nearly_necessary(seed, n=4000):
    "What is left out does next to nothing: necessity is folded where its prompts' noise lies."
    g, e = torch.Generator().manual_seed(100 + seed), made_up(seed, n, str(seed))
    left_out = e.runs.ablated + 0.01 * e.runs.clean + torch.randn(n, generator=g)
    return replace(e, runs=e.runs._replace(left_out=left_out))


def test_intervals_of_a_folded_part_cover():
    coverage = interval_coverage([nearly_necessary(s) for s in range(4)], n=96, repeats=200).coverage
    assert coverage["necessity"] >= 0.92 and coverage["score"] >= 0.92


@pytest.mark.parametrize("run,part", [("reconstructed", 0), ("left_out", 1)])
def test_a_denominator_of_zero_is_no_perfect_part(run, part):
    ones = torch.ones(5)
    runs = Runs(ones, ones, ones, ones)._replace(**{run: 3 * ones})  # ablation costs nothing: 2 / 0, or 1 − 2 / 0
    assert score_parts([Evidence("a", runs)])[0, part] == 0
    less = runs._replace(**{run: -3 * ones})
    assert score_parts([Evidence("a", less)])[0, part] == 0


def test_a_skyline_at_the_floor_gives_no_perfect_controllability():
    n, ones = 6, torch.ones(6, 1)
    edits, nothing = Edit(ones.expand(n, 2), ones.expand(n, 2)), Edit(0 * ones, 0 * ones)
    control = ControlEvidence(edits, 0 * ones.expand(n, 2), nothing, nothing, 0 * ones, Edit(ones, ones))
    for measure in ("success", "effect"):
        e = replace(made_up(0, n=n), control=control, measure=measure)
        assert score_parts([e])[0, 2] == 0


def test_texts_are_drawn_and_not_their_copies():
    e, texts = made_up(0, n=40), [str(i % 20) for i in range(40)]
    assert distinct_rows(texts).tolist() == list(range(20))
    table = coverage_of_sets({"a": [e], "b": [e]}, texts, sizes=(16,), repeats=20)
    alone = interval_coverage([e.at(torch.arange(20))], 16, 20)
    for name in "ab": np.testing.assert_array_equal(table.loc[name, 16].to_numpy(), alone.to_numpy())


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
    nodes, ladders = rungs
    x = capture(model, task.test.prompts, [nodes[0]])[nodes[0]]

    def fired(how): return [len(s.find(nodes[0]).encode(x).indices.unique()) for s in ladders[how]]
    split, merged = fired("split"), fired("merged")
    assert split == sorted(split) and split[-1] > 3 * split[0]
    assert merged == sorted(merged, reverse=True) and merged[-1] < 0.5 * merged[0]


# Hashes

def test_hashes_tell_tasks_and_saes_apart(task, sae_sets):
    tokens = task.prompts.tokens.clone()
    tokens[0, 3] += 1
    other = replace(task, prompts=replace(task.prompts, tokens=tokens))
    assert task.digest == task[:].digest != other.digest
    saes = load_saes("tiny-gpt2-res-topk")
    first = next(iter(saes))
    moved = replace(saes, saes=saes.saes | {first.node: replace(first, b_dec=first.b_dec + 1e-3)})
    assert saes.digest == load_saes("tiny-gpt2-res-topk").digest != moved.digest
