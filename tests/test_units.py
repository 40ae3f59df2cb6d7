"""Named units against plain loops and scikit-learn: on, κ, carry, lists, coverage, and the few latents kept."""
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import (
    PlainUnits, added, exact_kappa, only_on, patched, plain_numbers, plain_ranking, prompts_by, share_along)
from sklearn.metrics import cohen_kappa_score, confusion_matrix
from torch.testing import assert_close

from sage_nb.core.activations import Node
from sage_nb.core.intervals import means
from sage_nb.measures.faithfulness import SPARSE_KS, largest, run_sparse
from sage_nb.measures.units import (
    Names, NamedUnits, Units, ValueHits, covering_units, is_on, kappa, name_units, spread_of, value_coverage,
    value_hits, value_table)
from sage_nb.report.trials import planted
from sage_nb.saes.reconstruction import Decomposition
from sage_nb.truth.features import Features
from sage_nb.truth.runs import set_up

SECTIONS = ("IO:v@IO", "IO:z@END", "S:k@S1")


@pytest.fixture(scope="module")
def part(task):
    "All training prompts and every sixth of the held-out ones."
    return task[~task.held_out | (torch.arange(len(task)) % 6 == 0)]


@pytest.fixture(scope="module")
def topk(sae_sets): return sae_sets["tiny-gpt2-res-topk"]


@pytest.fixture(scope="module")
def benches(model, part, sections, truth):
    return {name: set_up(model, part, next(s for s in sections if s.name == name), truth) for name in SECTIONS}


@pytest.fixture(scope="module")
def readings(benches, part, topk): return {name: name_units(bench, part, topk) for name, bench in benches.items()}


@pytest.fixture(scope="module")
def plain(benches, part, topk):
    return {name: {node: PlainUnits(bench, part, topk, node) for node in bench.section.nodes}
            for name, bench in benches.items()}


# κ

@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_kappa_is_cohens(prompts):
    on, holds = np.array(prompts).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where both never change there is no agreement beyond chance
        expected = np.nan_to_num(cohen_kappa_score(on, holds))
    shares = (torch.tensor(x.mean()) for x in (on & holds, on, holds))
    assert kappa(*shares).item() == pytest.approx(expected, abs=1e-12)
    assert float(exact_kappa((on & holds).sum(), on.sum(), holds.sum(), len(on))) == pytest.approx(expected, abs=1e-12)


def test_a_unit_that_is_always_on_or_fires_by_chance_has_no_name():
    drawn = np.random.default_rng(0)
    holds = torch.from_numpy(drawn.random(20_000) < 0.9).double()  # F1 of always on is 0.95
    for on in (torch.ones(20_000), torch.from_numpy(drawn.random(20_000) < 0.5)):
        found = kappa((on * holds).mean(), on.double().mean(), holds.mean())
        assert abs(found) < 0.02


# What is on

def made_of(latents, indices, origin=None):
    "A decomposition without bias and error, by two SAEs or by the first of them."
    nothing, origin = 0 * latents[:, 0], torch.zeros_like(indices) if origin is None else origin
    saes = Node("resid_pre", 0), Node("resid_pre", 1)
    return Decomposition(latents, indices, nothing, nothing, origin, saes, "difference")


def test_a_latent_is_on_from_a_twentieth_of_the_sum_and_of_the_spread():
    whole = torch.tensor([[[19.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [[19.03, 0.0], [0.97, 0.0], [0.0, 0.0]]]).double()
    some = made_of(whole, torch.arange(3).expand(2, 3))
    assert is_on(some, 0.0).tolist() == [[True, True, False], [True, False, False]]
    assert is_on(some, 19.9).tolist() == [[True, True, False], [True, False, False]], "the sum is larger"
    assert is_on(some, 20.1).tolist() == [[True, False, False], [True, False, False]]
    opposite = made_of(torch.tensor([[[3.0, 0.0], [-3.0, 0.0], [0.1, 0.0]]]).double(), torch.arange(3)[None])
    assert is_on(opposite, 2.0).tolist() == [[True, True, True]] and is_on(opposite, 2.01)[0, 2].item() is False
    nothing = made_of(torch.zeros(1, 3, 2), torch.arange(3)[None])
    assert not is_on(nothing, 0.0).any(), "where nothing is said nothing is on"


def test_the_spread_is_the_distance_to_the_mean():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).double() + 3
    assert spread_of(x) == pytest.approx(np.sqrt(x.numpy().var(0).sum()))


# Names, on made-up latents

@st.composite
def worlds(draw, n=16, latents=4, d=2, n_values=3):
    "What two SAEs' latents add in some prompts, each prompt's value, and the values' vectors."
    def some(of, many): return st.lists(of, min_size=many, max_size=many)
    codes = draw(some(some(st.sampled_from([0, 0, 0, 1, 2, 5]), latents), n))
    directions, vectors = (draw(some(some(st.integers(-6, 6), d), many)) for many in (latents, n_values))
    values = draw(some(st.integers(-1, n_values - 1), n))
    order = draw(st.permutations(range(latents)))
    terms = torch.tensor(codes).double()[..., None] * torch.tensor(directions).double()
    entries = torch.tensor(order).expand(n, latents)
    return made_of(terms[:, order], entries % 3, entries // 3), values, torch.tensor(vectors).double()


def names_of(world, spread):
    "Names by the package, with the vectors as they are."
    decomposition, values, vectors = world
    counts = torch.ones(len(vectors))  # the mean of the vectors is taken off by both
    features = Features(("A",), tuple((f"v{i}",) for i in range(len(vectors))), vectors, counts, 1.0)
    return Names.of(Units.of(decomposition, spread), decomposition, features, torch.tensor(values))


@settings(max_examples=80)
@given(worlds(), st.sampled_from([0.0, 2.0, 60.0]))
def test_names_equal_plain_loops(world, spread):
    decomposition, values, vectors = world
    names, prompts = names_of(world, spread), added(decomposition)
    on = only_on(prompts, spread)
    numbers = plain_numbers(prompts, on, values, (vectors - vectors.mean(0)).numpy())
    units = [(decomposition.saes[key // 2**40], key % 2**40) for key in names.units.keys.tolist()]
    assert set(units) == set(numbers) and len(names.units) == len(units)
    for row, unit in enumerate(units):
        for v in range(len(vectors)):
            found = (x[row, v].item() for x in (names.kappa, names.carry, names.share, names.precision, names.recall))
            assert tuple(found) == pytest.approx(tuple(map(float, numbers[unit][v])), abs=1e-12)
            kappa, carry = numbers[unit][v][:2]
            assert names.quality[row, v].item() == pytest.approx(max(float(kappa), 0) * carry, abs=1e-12)
    for v in range(len(vectors)):
        assert [units[row] for row in names.ranking(v)] == plain_ranking(on, numbers, v)
    some = [unit for unit in numbers if any(kappa >= 0.1 for kappa, *_ in numbers[unit])]
    assert {units[row] for row in np.flatnonzero(names.named)} == set(some)


def side(on, share):
    "A latent in the plane that adds so much of the first vector where it is on."
    return torch.tensor(on).double()[:, None] * torch.tensor([share, 0.0]).double()


@pytest.mark.xfail(strict=True, reason="κ is compared to its last digit")
def test_units_of_equal_kappa_are_told_apart_by_their_share_and_not_by_rounding():
    "κ of a value that 6 of 12 prompts have is 1/6 for a latent that is on in 1 of them, and for one in 4 and 3 others."
    values = [0] * 6 + [1] * 6
    few, many = [1] + [0] * 11, [1] * 4 + [0] * 2 + [1] * 3 + [0] * 3
    assert exact_kappa(1, 1, 6, 12) == exact_kappa(4, 7, 6, 12)
    for small, large in (((few, 0.2), (many, 2.0)), ((many, 0.2), (few, 2.0))):
        terms = torch.stack([side(*small), side(*large)], 1)
        world = made_of(terms, torch.arange(2).expand(12, 2)), values, torch.eye(2).double()
        names = names_of(world, 0.0)
        assert names.ranking(0).tolist() == [1, 0]


# Names and coverage, on a trained SAE

@pytest.mark.parametrize("name", SECTIONS)
def test_names_of_a_trained_sae_equal_plain_loops(readings, plain, name):
    for node, read in readings[name].items():
        attribute, slow = name.partition(":")[0], plain[name][node]
        names = read.names[attribute]
        units = [(read.train.saes[key // 2**40], key % 2**40) for key in names.units.keys.tolist()]
        assert set(units) == set(slow.numbers) and read.held_out.n == len(slow.test)
        for row, unit in enumerate(units):
            expected = np.array(slow.numbers[unit], dtype=float).T
            found = torch.stack([names.kappa, names.carry, names.share, names.precision, names.recall])[:, row]
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
        for v, ranking in enumerate(slow.rankings): assert [units[row] for row in names.ranking(v)] == ranking


def best_unit(slow, v):
    "Node and unit of largest κ · carry; of those that are as good to a thousandth, by share, then by their prompts."
    tried = []
    for node, some in slow.items():
        active = prompts_by(some.train_on)
        for unit, numbers in some.numbers.items():
            kappa, carry, share, *_ = numbers[v]
            early = sum((p + 1) ** 0.5 for p in active[unit])
            tried.append((max(float(kappa), 0) * carry, -round(share / 1e-3), early, node, unit))
    top = max(quality for quality, *_ in tried)
    if top < 1e-9: return None
    return min((one for one in tried if one[0] >= top - 1e-3), key=lambda one: one[1:3])[3:]


@pytest.mark.parametrize("name", SECTIONS)
def test_coverage_equals_a_plain_loop_over_values_and_prompts(benches, readings, plain, part, name):
    bench, slow, attribute = benches[name], plain[name], name.partition(":")[0]
    hits, table = value_hits(bench, readings[name]), value_table(bench, part, readings[name])
    covered, occurring = [], 0
    for v, label in enumerate(hits.holds.T.tolist()):
        unit, has = best_unit(slow, v), [value == v for value in next(iter(slow.values())).test_values]
        assert label == has
        node, number = unit or (bench.section.nodes[0], (None, None))
        some = slow[node]
        on = [number in here for here in some.test_on]
        carried = [min(max(share_along(here[number], some.vectors[v]), 0), 1) if a and h else 0
                   for here, a, h in zip(some.test_on, on, has)]
        assert hits.on[:, v].tolist() == on and hits.both[:, v].tolist() == [a and h for a, h in zip(on, has)]
        assert hits.carried[:, v].tolist() == pytest.approx(carried, abs=1e-4)
        assert (table.node[v], table.latent[v]) == (str(node), number[1])
        if not any(has): continue
        occurring, both = occurring + 1, sum(a and h for a, h in zip(on, has))
        quality = max(float(exact_kappa(both, sum(on), sum(has), len(on))), 0)
        covered.append(quality * sum(carried) / max(both, 1))
    assert value_coverage(means(hits)).item() == pytest.approx(sum(covered) / occurring, abs=1e-4)
    labels = [value for value, in bench.truth[bench.section.nodes[0]][attribute].values]
    assert list(table.value) == labels and 0.1 < sum(covered) / occurring < 1


def test_the_unit_of_a_value_may_stand_at_any_node(benches, readings):
    some = readings["IO:v@IO"]
    chosen = {unit[0] for unit in covering_units(some, "IO") if unit}
    assert len(chosen) > 1
    backwards = dict(reversed(some.items()))
    assert covering_units(backwards, "IO") == covering_units(some, "IO")
    alone = {node: value_coverage(means(value_hits(benches["IO:v@IO"], {node: read}))) for node, read in some.items()}
    assert value_coverage(means(value_hits(benches["IO:v@IO"], some))) > max(alone.values()) - 0.05


hit = st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 4))  # on, value of three, carried in quarters


@given(st.lists(st.lists(hit, min_size=3, max_size=3), min_size=2, max_size=25))
def test_coverage_of_made_up_hits_equals_scikit_learn(rows):
    values = np.array([row[0][1] for row in rows])  # one value a prompt
    holds = values[:, None] == np.arange(3)
    on, carried = (np.array([[one[i] for one in row] for row in rows]) for i in (0, 2))
    hits = ValueHits(*(torch.from_numpy(x).double() for x in (on & holds, on, holds, carried / 4 * (on & holds))))
    expected = []
    for v in range(3):
        if not holds[:, v].any(): continue
        (_, _), (_, both) = confusion_matrix(holds[:, v], on[:, v], labels=[False, True])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agreed = max(np.nan_to_num(cohen_kappa_score(holds[:, v], on[:, v])), 0)
        expected.append(agreed * (carried / 4)[on[:, v] & holds[:, v], v].mean() if both else 0)
    assert value_coverage(means(hits)).item() == pytest.approx(np.mean(expected), abs=1e-12)


def test_a_value_that_no_held_out_prompt_has_is_left_out_and_one_without_a_unit_counts_0():
    holds = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 1.0, 0]]).double()
    on = holds * torch.tensor([1.0, 0, 1.0])
    assert value_coverage(means(ValueHits(on, on, holds, on))).item() == 0.5


def test_a_dead_set_has_no_units(benches, part):
    bench = benches["IO:v@IO"]
    whole = name_units(bench, part, planted(bench))
    silent = {node: Decomposition(0 * r.train.latents, r.train.indices, r.train.bias, r.train.error, r.train.origin,
                                  r.train.saes, r.train.route) for node, r in whole.items()}
    read = {}
    for node, some in silent.items():
        features = bench.truth[node]["IO"]
        units = Units.of(some, 1.0)
        names = Names.of(units, some, features, features.index(part.train.attributes))
        test = some.at(slice(0, len(bench.task)))
        read[node] = NamedUnits(some, test, Units.of(test, 1.0), {"IO": names})
        assert len(units) == 0 and not names.named.any() and not names.ranking(0).size
        assert_close(largest(read[node], 4), test.bias)
    assert set(covering_units(read, "IO")) == {None}
    assert value_coverage(means(value_hits(bench, read))).item() == 0


# The few latents that are kept

def plain_largest(slow, i, k, named_only):
    "The bias and the k latents of largest share in held-out prompt i; the named ones only, where asked."
    here, whole = slow.test[i], sum(slow.test[i].values())
    some = slow.named & set(slow.test_on[i]) if named_only else set(here)
    best = sorted(some, key=lambda unit: -share_along(here[unit], whole))[:k]
    return slow.bias[i] + sum(here[unit] for unit in best)


@pytest.mark.parametrize("named_only", [False, True])
@pytest.mark.parametrize("name", SECTIONS)
def test_the_kept_latents_equal_a_plain_loop(benches, readings, plain, name, named_only):
    bench = benches[name]
    for node, read in readings[name].items():
        slow = plain[name][node]
        for k in (1, 2, 5, 10**6):
            kept = largest(read, k, named_only)
            expected = [plain_largest(slow, i, k, named_only) for i in range(len(bench.task))]
            np.testing.assert_allclose(kept.numpy(), np.stack(expected), atol=1e-4)
        if not named_only: assert_close(largest(read, 10**6, False), read.test.reconstruction, rtol=1e-4, atol=1e-4)


def test_runs_with_few_latents_equal_hooked_runs_one_prompt_at_a_time(benches, readings):
    bench, read = benches["IO:z@END"], readings["IO:z@END"]
    few, everything = run_sparse(bench, read)
    alone, nothing = run_sparse(bench, read, whole=False)
    assert nothing is None and all(torch.equal(a, b) for a, b in zip(alone, few))
    steps = {k: {node: largest(some, k) for node, some in read.items()} for k in SPARSE_KS}
    steps["all"] = {node: some.test.reconstruction for node, some in read.items()}
    runs = dict(zip(SPARSE_KS, zip(few.kept.T, few.left_out.T))) | {"all": everything[2:]}

    def metric(values, i):
        logits = patched(bench.model, bench.task, {node: x[i] for node, x in values.items()}, i)
        return (logits[bench.task.answers[i]] - logits[bench.task.distractors[i]]).item()
    for k, put_in in steps.items():
        rest = {node: bench.truth[node].mean + x - put_in[node] for node, x in bench.acts.items()}
        kept, left_out = runs[k]
        for i in (0, 5, 11):
            assert kept[i].item() == pytest.approx(metric(put_in, i), abs=1e-3)
            assert left_out[i].item() == pytest.approx(metric(rest, i), abs=1e-3)
    assert torch.equal(few.clean, bench.clean) and torch.equal(few.ablated, bench.ablated)
