"""The score and its validation: parts by plain loops, SAEs spoiled on purpose, intervals that cover."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import exact_kappa
from torch.testing import assert_close

from sage_nb.core.activations import capture
from sage_nb.core.intervals import each, interval, means, resample_counts, resampled_means
from sage_nb.measures.control import area
from sage_nb.measures.faithfulness import SPARSE_KS, SparseRuns
from sage_nb.measures.named import LEAST_CONTROL, NAMED_KS, NamedEdits, measure_of, named_control
from sage_nb.measures.score import (
    HALF, PARTS, Answers, Evidence, best_baseline, compare, margin, over_sections, sage_score, score_parts,
    section_scores)
from sage_nb.measures.units import ValueHits
from sage_nb.report.evaluation import scores_of
from sage_nb.report.validation import LADDERS, coverage_of_sets, distinct_rows, interval_coverage, ladder
from sage_nb.saes.baselines import supervised_as_sae
from sage_nb.saes.sets import load_saes

N_VALUES = 4


def sparse(g, n, share):
    "Few latents bring back about so much of a metric that ablation costs, more the more there are."
    clean, ablated = 4 + torch.randn(n, generator=g), torch.randn(n, generator=g)
    reach = share * torch.linspace(0.6, 1, len(SPARSE_KS))
    kept, left_out = (x[:, None] + reach * (y - x)[:, None] for x, y in ((ablated, clean), (clean, ablated)))
    noise = 0.3 * torch.randn(2, n, len(SPARSE_KS), generator=g)
    return SparseRuns(clean, ablated, kept + noise[0], left_out + noise[1])


def named(g, n, share):
    "Edits by name that succeed in about so many prompts, of which a fifth cannot be edited."
    edited = (torch.rand(n, 1, generator=g) < 0.8).double()
    wanted = torch.rand(n, 1, generator=g).double() + 1
    success = (torch.rand(n, len(NAMED_KS), generator=g) < share * torch.linspace(0.6, 1, len(NAMED_KS))).double()
    isolation = 1 - 0.5 * (torch.rand(n, len(NAMED_KS), generator=g) < 0.2).double()
    floor = (torch.rand(n, 1, generator=g) < 0.05).double()
    product = share * wanted * torch.tensor([0.5, 0.8, 1.0, 1.3])
    return NamedEdits(*(x * edited for x in (success, product, isolation, floor, wanted)), edited)


def values(g, n, share):
    "Latents that are on for their value, at times for another, and carry about so much."
    value = torch.randint(N_VALUES, (n, 1), generator=g)
    holds = (value == torch.arange(N_VALUES)).double()
    on = ((holds > 0) ^ (torch.rand(n, N_VALUES, generator=g) < 0.1)).double()
    carried = (share + 0.2 * torch.rand(n, N_VALUES, generator=g) - 0.1).clamp(0, 1).double()
    return ValueHits(on * holds, on, holds, carried * on * holds)


def made_up(seed, n=60, section="IO:z@END", measure="success", weight=1.0, share=0.7):
    "Evidence on all parts, with numbers of the right kinds; the planted dictionary is better, not perfect."
    g = torch.Generator().manual_seed(seed)
    own, planted = (Answers(sparse(g, n, s), named(g, n, s), values(g, n, s)) for s in (share, 0.95))
    return Evidence(section, own, planted, weight, measure)


def plain_area(y, ks):
    "The area under a curve over log k, as a share of its width."
    return np.trapezoid(y, np.log(ks)) / (np.log(ks[-1]) - np.log(ks[0]))


def clipped(x): return min(max(x, 0.0), 1.0)


def plain_faithfulness(runs, rows):
    "From the metrics of these prompts, number by number."
    def mean(column): return sum(float(column[i]) for i in rows) / len(rows)
    clean, ablated, y = mean(runs.clean), mean(runs.ablated), []
    for k in range(len(SPARSE_KS)):
        recovered = (mean(runs.kept[:, k]) - ablated) / (clean - ablated)
        necessary = 1 - abs(ablated - mean(runs.left_out[:, k])) / abs(ablated - clean)
        y.append((clipped(1 - abs(1 - recovered)) + clipped(necessary)) / 2)
    return plain_area(y, SPARSE_KS)


def plain_control(edits, rows, measure):
    "From those of these prompts that can be edited; the others do not count."
    rows, y = [i for i in rows if edits.edited[i]], []
    for k in range(len(NAMED_KS)):
        success = np.mean([float(edits.success[i, k]) - float(edits.floor[i]) for i in rows])
        effect = sum(float(edits.product[i, k]) for i in rows) / sum(float(edits.target[i]) for i in rows)
        gain = success if measure == "success" else 1 - abs(1 - effect)
        y.append(clipped(gain) * np.mean([float(edits.isolation[i, k]) for i in rows]))
    return plain_area(y, NAMED_KS)


def plain_coverage(hits, rows):
    "Kappa from counts times what is carried, mean over the values that occur."
    found = []
    for v in range(hits.holds.shape[1]):
        on, holds = ([bool(x[i, v]) for i in rows] for x in (hits.on, hits.holds))
        if not any(holds): continue
        carried = [float(hits.carried[i, v]) for i, a, h in zip(rows, on, holds) if a and h]
        agreed = float(exact_kappa(len(carried), sum(on), sum(holds), len(rows)))
        found.append(max(agreed, 0) * np.mean(carried) if carried else 0.0)
    return np.mean(found)


def plain_parts(e, rows):
    "The three parts from the prompts themselves; each is a share of what the planted dictionary reaches."
    def reached(a):
        return (plain_faithfulness(a.sparse, rows), plain_control(a.named, rows, e.measure),
                plain_coverage(a.values, rows))
    return [clipped(x / most) for x, most in zip(reached(e.own), reached(e.planted))]


def plain_score(evidence, rows):
    "The geometric mean of the parts, and of that the mean over sections by their weights."
    scores = [np.prod(plain_parts(e, rows)) ** (1 / 3) for e in evidence]
    return sum(e.weight * score for e, score in zip(evidence, scores)) / sum(e.weight for e in evidence)


def two_sections(seed, **options):
    return [made_up(seed, **options), made_up(seed + 1, section="S:q@END", measure="effect", weight=0.3, **options)]


@pytest.mark.parametrize("seed", range(3))
def test_parts_and_score_equal_plain_loops(seed):
    evidence = two_sections(seed)
    expected = [plain_parts(e, range(60)) for e in evidence]
    assert all(0.1 < part < 1 for parts in expected for part in parts), "no part is clipped, so that each is seen"
    parts = score_parts(evidence)
    np.testing.assert_allclose(parts, expected, atol=1e-6)
    np.testing.assert_allclose(section_scores(parts), np.prod(expected, 1) ** (1 / 3), atol=1e-6)
    assert sage_score(evidence).value == pytest.approx(plain_score(evidence, range(60)), abs=1e-6)


def test_a_section_counts_by_its_weight():
    a, b = made_up(0, weight=0.25), made_up(1, section="S:v@S2", weight=0.75)
    one, other = (sage_score([e]).value for e in (a, b))
    assert one != other and sage_score([a, b]).value == pytest.approx(0.25 * one + 0.75 * other)
    assert sage_score([replace(a, weight=0.0), b]).value == pytest.approx(other)
    half = [replace(e, weight=e.weight / 2) for e in (a, b)]
    assert sage_score(half) == pytest.approx(sage_score([a, b])), "only the ratio of the weights counts"
    assert over_sections([a, b], torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist() == [0.25, 0.75]


def test_the_planted_dictionary_scores_1_exactly_and_nothing_scores_0():
    evidence = two_sections(3)
    same = [replace(e, own=e.planted) for e in evidence]
    assert (score_parts(same) == 1).all()
    assert sage_score(same)[:3] == (1, 1, 1), "in every resample, too"
    for e in evidence:
        sparse, edits, hits = e.own
        ablated, clean = (x[:, None].expand_as(sparse.kept) for x in (sparse.ablated, sparse.clean))
        nothing = Answers(
            sparse._replace(kept=ablated, left_out=clean),
            edits._replace(success=edits.floor.expand_as(edits.success), product=0 * edits.product),
            hits._replace(both=0 * hits.both, on=0 * hits.on, carried=0 * hits.carried))
        assert score_parts([replace(e, own=nothing)]).tolist() == [[0, 0, 0]]
        for i, part in enumerate(nothing._fields):
            lacking = replace(e, own=e.own._replace(**{part: getattr(nothing, part)}))
            assert score_parts([lacking])[0, i] == 0
            assert sage_score([lacking]).value == 0, "no part makes up for another"


def test_the_score_and_its_interval_equal_a_plain_bootstrap():
    "The planted dictionary is resampled along with the SAE."
    evidence, counts = two_sections(0), resample_counts(60)[:12].tolist()
    drawn = [[i for i, times in enumerate(count) for _ in range(int(times))] for count in counts]
    resampled = each(lambda x: x[:12], resampled_means([e.numbers for e in evidence]))
    ours = over_sections(evidence, section_scores(score_parts(evidence, resampled)))
    expected = [plain_score(evidence, rows) for rows in drawn]
    assert ours.tolist() == pytest.approx(expected, abs=1e-6) and np.std(expected) > 1e-3
    unpaired = over_sections(evidence, section_scores(score_parts(evidence, [
        (own, planted) for (own, _), (_, planted) in zip(resampled, each(lambda x: x.flip(0), resampled))])))
    assert (ours - unpaired).abs().max() > 1e-3, "another resample for the planted dictionary gives other numbers"
    assert sage_score(evidence).n == 60


def test_the_difference_and_its_interval_equal_a_plain_bootstrap():
    a, b, expected = two_sections(0, share=0.75), two_sections(5), []
    for count in resample_counts(60)[:12].tolist():
        rows = [i for i, times in enumerate(count) for _ in range(int(times))]
        expected.append(plain_score(a, rows) - plain_score(b, rows))
    of_both = each(lambda x: x[:12], resampled_means([[e.numbers for e in some] for some in (a, b)]))
    ours = [over_sections(some, section_scores(score_parts(some, m))) for some, m in zip((a, b), of_both)]
    assert (ours[0] - ours[1]).tolist() == pytest.approx(expected, abs=1e-6)
    whole = compare(a, b)
    assert whole.difference.lo <= whole.difference.value <= whole.difference.hi
    everything = range(60)
    assert whole.difference.value == pytest.approx(plain_score(a, everything) - plain_score(b, everything), abs=1e-6)
    assert tuple(whole.parts) == PARTS
    for i, (name, difference) in enumerate(whole.parts.items()):
        means_of = [sum(e.weight * plain_parts(e, everything)[i] for e in some) / 1.3 for some in (a, b)]
        assert difference.value == pytest.approx(means_of[0] - means_of[1], abs=1e-6), name
    back = compare(b, a)
    assert (back.difference.value, back.difference.lo) == pytest.approx((-whole.difference.value, -whole.difference.hi))
    with_itself = compare(a, a).difference
    assert with_itself[:3] == (0, 0, 0)


def test_a_verdict_is_given_only_where_the_interval_excludes_zero():
    good, same, bad = (two_sections(s, n=400, share=share) for s, share in ((0, 0.9), (2, 0.9), (4, 0.5)))
    assert compare(good, bad, ("good", "bad")).verdict == "good scores higher than bad"
    assert compare(bad, good, ("bad", "good")).verdict == "good scores higher than bad"
    assert "cannot be told apart" in compare(good, same).verdict


def test_evidence_of_some_prompts_is_that_of_those_rows():
    e, rows = made_up(3), torch.tensor([4, 4, 7, 0, 59, 23, 31, 12])
    np.testing.assert_allclose(score_parts([e.at(rows)])[0], plain_parts(e, rows.tolist()), atol=1e-6)
    mask = torch.arange(60) < 30
    np.testing.assert_allclose(score_parts([e.at(mask)])[0], plain_parts(e, range(30)), atol=1e-6)
    assert (e.at(rows).section, e.at(rows).measure, e.at(rows).weight) == (e.section, e.measure, e.weight)


def test_prompts_that_cannot_be_edited_do_not_count_in_control():
    edits = made_up(2).own.named
    editable = edits.edited[:, 0] > 0
    assert 0 < editable.sum() < 60
    for measure in ("success", "effect"):
        alone = named_control(means(each(lambda x: x[editable], edits)), measure)
        assert_close(named_control(means(edits), measure), alone)


@pytest.mark.parametrize("asked", [("sparse",), ("values",), ("sparse", "values"), ("named", "values")])
def test_a_part_that_was_not_asked_for_is_left_out_for_both(asked):
    def only(answers): return Answers(**{part: getattr(answers, part) for part in asked})
    whole, measure = made_up(0), "success" if "named" in asked else None
    some = [replace(e, own=only(e.own), planted=only(e.planted), measure=measure) for e in (whole, made_up(1))]
    which = [PARTS[Answers._fields.index(a)] for a in asked]
    parts, expected = score_parts(some[:1])[0], plain_parts(whole, range(60))
    assert (~parts.isnan()).tolist() == [part in which for part in PARTS]
    known = [part for part, name in zip(expected, PARTS) if name in which]
    assert parts[~parts.isnan()].tolist() == pytest.approx(known, abs=1e-6)
    assert sage_score(some[:1]).value == pytest.approx(np.prod(known) ** (1 / len(known)), abs=1e-6)
    assert list(compare(some[:1], some[1:]).parts) == which


# Areas, and what control is seen by

curves = st.lists(st.floats(-2, 3), min_size=1, max_size=6)


@given(curves, st.data())
def test_the_area_is_numpys_over_log_k(y, data):
    ks = sorted(data.draw(st.sets(st.integers(1, 64), min_size=len(y), max_size=len(y))))
    expected = plain_area(np.clip(y, 0, 1), ks) if len(y) > 1 else clipped(y[0])
    assert area(torch.tensor(y, dtype=torch.double), ks).item() == pytest.approx(expected, abs=1e-12)


yes_or_no, nats = st.booleans(), st.floats(-2, 2)
prompt = st.tuples(yes_or_no, yes_or_no, yes_or_no, nats, nats, st.sampled_from([0.0, 0.5, 1.0]))


@given(st.lists(prompt, min_size=2, max_size=12), st.sampled_from(["success", "effect"]))
def test_control_by_name_equals_a_plain_loop(prompts, measure):
    "One number of exchanges; each prompt can be edited or not, succeeds or not, with and without the edit."
    can, success, floor, got, wanted, kept = (torch.tensor(x, dtype=torch.double)[:, None] for x in zip(*prompts))
    m = NamedEdits(success * can, got * wanted * can, kept * can, floor * can, wanted**2 * can, can)
    ours = named_control(means(m), measure)
    rows = [p for p in prompts if p[0]]
    if not rows: return assert_close(ours, torch.zeros(1).double())
    gain = np.mean([float(p[1]) - float(p[2]) for p in rows])
    if measure == "effect":
        down = sum(p[4] ** 2 for p in rows)
        if down < 1e-6: return
        gain = 1 - abs(1 - sum(p[3] * p[4] for p in rows) / down)
    assert ours.item() == pytest.approx(clipped(gain) * np.mean([p[5] for p in rows]), abs=1e-9)


def controlled(success, effect, n=200):
    "A planted dictionary that succeeds in so many prompts, and whose edits have such an effect."
    g = torch.Generator().manual_seed(0)
    def every(x): return torch.full((n, 1), x).double()
    done = (torch.rand(n, len(NAMED_KS), generator=g) < success).double()
    product = effect * torch.ones(n, len(NAMED_KS)).double()
    return NamedEdits(done, product, every(1.0).expand_as(done), every(0.0), every(1.0), every(1.0))


def test_control_is_seen_by_success_then_by_effect_or_not_at_all():
    assert measure_of(controlled(0.9, 1.0)) == "success"
    assert measure_of(controlled(0.0, 0.9)) == "effect"
    assert measure_of(controlled(0.0, 1.95)) is None, "twice too much is as bad as nothing"
    assert measure_of(controlled(0.0, 0.0)) is None
    near = controlled(LEAST_CONTROL + 0.02, 0.0, n=60)
    shown = interval(near, lambda m: area(named_control(m, "success"), NAMED_KS))
    assert shown.lo < LEAST_CONTROL and measure_of(near) is None, "clearly above, or it shows nothing"


def test_a_disturbing_edit_earns_less():
    whole = controlled(0.9, 1.0)
    for measure in ("success", "effect"):
        half = named_control(means(whole._replace(isolation=0.5 * whole.isolation)), measure)
        assert_close(half, 0.5 * named_control(means(whole), measure))


# Intervals

def test_intervals_cover_a_planted_score():
    population = two_sections(0, n=6000)
    coverage = interval_coverage(population, n=128, repeats=120)
    assert list(coverage.index) == ["score", *PARTS] and coverage.value["score"] == sage_score(population).value
    assert (coverage.coverage >= 0.91).all() and coverage.loc["score", "coverage"] <= 0.99
    too_narrow = interval_coverage([e.at(torch.arange(40)) for e in population], n=4, repeats=60)
    assert too_narrow.loc["faithfulness", "coverage"] < 0.95  # four prompts are too few for a bootstrap: it shows


def nearly_necessary(seed, n=4000):
    "What is left out does next to nothing: necessity is folded where its prompts' noise lies."
    g, e = torch.Generator().manual_seed(100 + seed), made_up(seed, n, str(seed))
    clean, ablated, kept, _ = e.own.sparse
    left_out = ablated[:, None] + 0.01 * clean[:, None] + torch.randn(kept.shape, generator=g)
    own = e.own._replace(sparse=e.own.sparse._replace(left_out=left_out))
    exact = SparseRuns(clean, ablated, clean[:, None].expand_as(kept), ablated[:, None].expand_as(kept))
    return replace(e, own=own, planted=e.planted._replace(sparse=exact))


def test_intervals_of_a_folded_part_cover():
    table = interval_coverage([nearly_necessary(s) for s in range(2)], n=96, repeats=100)
    assert table.value["faithfulness"] < 0.95, "not cut off"
    assert table.coverage["faithfulness"] >= 0.9 and table.coverage["score"] >= 0.9


# Where there is nothing to divide by

@pytest.mark.parametrize("sign", [3, -3])
def test_an_ablation_that_costs_nothing_is_no_perfect_faithfulness(sign):
    ones, columns = torch.ones(5), torch.ones(5, len(SPARSE_KS))
    runs = Answers(SparseRuns(ones, ones, sign * columns, sign * columns))  # 2 / 0, and 1 − 2 / 0
    good = Answers(SparseRuns(ones, 0 * ones, columns, 0 * columns))
    assert score_parts([Evidence("a", runs, good)])[0, 0] == 0
    assert score_parts([Evidence("a", good, good)])[0, 0] == 1
    assert score_parts([Evidence("a", good, runs)])[0, 0] == 0, "where the planted one reaches nothing, no SAE does"


def test_a_planted_dictionary_that_cannot_edit_gives_no_perfect_control():
    e = made_up(0)
    unmoved = e.planted.named.floor.expand(-1, len(NAMED_KS))
    still = e.planted.named._replace(success=unmoved, product=0 * unmoved)
    for measure in ("success", "effect"):
        parts = score_parts([replace(e, planted=e.planted._replace(named=still), measure=measure)])[0]
        assert parts[1] == 0 and parts[0] > 0
    nowhere = each(lambda x: 0 * x, e.own.named)
    unedited = replace(e, own=e.own._replace(named=nowhere), planted=e.planted._replace(named=nowhere))
    assert score_parts([unedited])[0, 1] == 0 and sage_score([unedited])[:3] == (0, 0, 0)


def test_texts_are_drawn_and_not_their_copies():
    e, texts = made_up(0, n=40), [str(i % 20) for i in range(40)]
    assert distinct_rows(texts).tolist() == list(range(20))
    table = coverage_of_sets({"a": [e], "b": [e]}, texts, sizes=(16,), repeats=20)
    alone = interval_coverage([e.at(torch.arange(20))], 16, 20)
    for name in "ab": np.testing.assert_array_equal(table.loc[name, 16].to_numpy(), alone.to_numpy())


# Beside what knows no feature

def test_margin_and_best_baseline_equal_plain_loops():
    own, tried = two_sections(0, share=0.9), {f"b{s}": two_sections(s, share=s / 10) for s in (2, 5, 4)}
    scores = {name: plain_score(some, range(60)) for name, some in tried.items()}
    best = max(scores, key=scores.get)
    found = margin(own, tried, "mine")
    assert (found.a, found.b) == ("mine", best)
    assert found.difference.value == pytest.approx(plain_score(own, range(60)) - scores[best], abs=1e-6)
    assert found.difference == compare(own, tried[best]).difference
    for i, section in enumerate(("IO:z@END", "S:q@END")):
        there = {name: np.prod(plain_parts(some[i], range(60))) ** (1 / 3) for name, some in tried.items()}
        name, score = best_baseline(tried)[section]
        assert name == max(there, key=there.get) and score == pytest.approx(max(there.values()), abs=1e-6)
        assert max(there.values()) != HALF
    table = scores_of(tried | {"mine": own}, ["mine"], list(tried)).set_index("sae")
    assert table.margin["mine"] == found.difference.value and table.margin.drop("mine").isna().all()
    for name, some in (tried | {"mine": own}).items():
        parts = [sum(e.weight * plain_parts(e, range(60))[i] for e in some) / 1.3 for i in range(3)]
        assert table.loc[name, list(PARTS)].tolist() == pytest.approx(parts, abs=1e-6)
        assert tuple(table.loc[name, ["score", "lo", "hi"]]) == sage_score(some)[:3]


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
