"""Interpretations against plain loops over sets and scikit-learn, known latents, and what must be refused."""
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch.testing import assert_close

from sage_nb.core.activations import Node, capture
from sage_nb.truth.dictionaries import Dictionary, Features, fit_dictionaries
from sage_nb.measures.faithfulness import faithfulness
from sage_nb.measures.diagnostics import keep_interpretable, occlusion, oversplitting
from sage_nb.measures.interpretability import Hits, f1, greedy_unions, interpret, predicates, share_covered
from sage_nb.core.intervals import interval, resample_counts
from sage_nb.tasks.planted import planted_circuit
from sage_nb.measures.activity import Activity, ActivityBuilder, activity
from sage_nb.saes.reconstruction import decompose, reconstruct
from sage_nb.saes.codes import Codes
from sage_nb.saes.sets import SAESet
from sage_nb.saes.baselines import supervised_as_sae
from sage_nb.truth.runs import set_up

HERE = Node("resid_pre", 0, None, "END")


def plain_f1(a: set, b: set): return 2 * len(a & b) / (len(a) + len(b)) if a or b else 0.0


def plain_values(rows):
    "(attribute, value) -> prompts."
    found = {}
    for i, row in rows.items():
        for key in row.items(): found.setdefault(key, set()).add(i)
    return found


def plain_union(active, values, most):
    "Add the value that raises F1 most, alphabetically first of equals."
    chosen, best, holds = [], 0.0, set()
    while len(chosen) < most:
        tried = [(plain_f1(active, holds | prompts), v) for v, prompts in sorted(values.items()) if v not in chosen]
        if not tried: break
        top = max(score for score, _ in tried)
        if top <= best: break
        best, value = next((score, v) for score, v in tried if score == top)
        chosen.append(value)
        holds = holds | values[value]
    return chosen, best


def plain_interpretation(active, rows, most=10):
    "Text and F1 of the best predicate; the first of equals among values, then intersections, then unions."
    values, attributes = plain_values(rows), list(next(iter(rows.values())))
    tried = [(f"{a} = {v}", values[a, v]) for b in attributes for a, v in sorted(values) if a == b]
    for a, b in combinations(attributes, 2):
        pairs = sorted({(row[a], row[b]) for row in rows.values()})
        tried += [(f"{a} = {v} ∧ {b} = {w}", values[a, v] & values[b, w]) for v, w in pairs]
    text, best = None, 0.0
    for name, prompts in tried:
        if plain_f1(active, prompts) > best: text, best = name, plain_f1(active, prompts)
    for a in attributes:
        chosen, score = plain_union(active, {v: p for (b, v), p in values.items() if b == a}, most)
        if score > best: text, best = f"{a} ∈ {{{', '.join(sorted(chosen))}}}", score
    return text, best


@st.composite
def worlds(draw, n_latents=6):
    "Attributes of some prompts, the prompts each latent is active in, and which prompts are scored on."
    n = draw(st.integers(8, 30))
    values = {"A": "pqrst", "B": "xy", "C": "uvw"}
    columns = {a: draw(st.lists(st.sampled_from(v), min_size=n, max_size=n)) for a, v in values.items()}
    row = st.lists(st.booleans(), min_size=n_latents, max_size=n_latents)
    on = np.array(draw(st.lists(row, min_size=n, max_size=n)))
    scoring = np.array(draw(st.permutations([True] * (n // 2) + [False] * (n - n // 2))))
    return pd.DataFrame(columns), on, scoring


def active_of(on) -> Activity:
    indices = torch.arange(on.shape[1]).expand(on.shape)
    return Activity.of_codes(Codes(indices, torch.from_numpy(on).float()), HERE)


def rows_of(attributes, keep): return {i: attributes.loc[i].to_dict() for i in attributes.index if keep[i]}


@settings(max_examples=60)
@given(worlds(), st.integers(1, 4))
def test_interpretations_equal_a_plain_loop_and_scikit_learn(world, most):
    attributes, on, scoring = world
    found = interpret(active_of(on), attributes, scoring, most=most)
    assert found.activity.index.tolist() == np.flatnonzero(on.any(0)).tolist()
    for i, latent in enumerate(found.activity.index):
        past = set(np.flatnonzero(on[:, latent] & ~scoring))
        text, best = plain_interpretation(past, rows_of(attributes, ~scoring), most)
        assert (found.predicates[i] and str(found.predicates[i])) == text
        assert found.f1_found[i] == best
        holds = found.predicates[i].holds(attributes)[scoring] if text else np.zeros(scoring.sum(), dtype=bool)
        expected = f1_score(holds, on[scoring, latent], zero_division=0)
        assert found.f1_scored[i].item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=20)
@given(worlds())
def test_coverage_ranking_and_splitting_equal_plain_loops(world):
    attributes, on, scoring = world
    found = interpret(active_of(on), attributes, scoring)
    past, now = plain_values(rows_of(attributes, ~scoring)), plain_values(rows_of(attributes, scoring))
    before, after = ([set(np.flatnonzero(column & keep)) for column in on.T] for keep in (~scoring, scoring))
    for a in attributes:
        covered, occurring, table = 0, 0, oversplitting(found, a, precision=0.7, min_active=2)
        for v in sorted(set(attributes[a])):
            had, has = past.get((a, v), set()), now.get((a, v), set())
            scores = {latent: plain_f1(active, had) for latent, active in enumerate(before)}
            shown = {p: i for i, p in enumerate(np.flatnonzero(~scoring))}  # the prompts it is found on, numbered

            def place(i): return -scores[i], -len(before[i] & had), sum(shown[p] for p in before[i]), i
            order = sorted((i for i in scores if scores[i] > 0), key=place)
            number = [str(value) for value in found.values].index(f"{a} = {v}")
            best_latent = found.best_latents[number]
            assert (found.activity.index[best_latent] if best_latent >= 0 else None) == (order[0] if order else None)
            best = plain_f1(after[order[0]], has) if order else 0
            if has:
                occurring += 1
                covered += best >= 0.5
            specific = [latent for latent, active in enumerate(before)
                        if len(active) >= 2 and len(active & had) >= 0.7 * len(active) - 1e-9]
            counted = [latent for latent in specific
                       if after[latent] and len(after[latent] & has) / len(after[latent]) >= 0.7 - 1e-9]
            assert table.latents[v] == len(counted)
            assert table.joint[v] == pytest.approx(plain_f1(set().union(*(after[i] for i in specific)), has), abs=1e-6)
            assert table.best[v] == pytest.approx(best, abs=1e-6)
        assert found.coverage(0.5, a).value == pytest.approx(covered / occurring)


def four(least): return st.lists(st.integers(least, 9), min_size=4, max_size=4)


@given(st.lists(st.tuples(four(0), st.integers(1, 5)), min_size=1, max_size=5), four(1), st.integers(1, 5))
def test_greedy_unions_equal_a_plain_loop(latents, sizes, most):
    hits = np.array([[min(h, n) for h, n in zip(row, sizes)] for row, _ in latents])
    active = np.array([row.sum() + rest for row, (_, rest) in zip(hits, latents)])
    chosen, best = greedy_unions(hits, active, np.array(sizes), most)
    for i, (row, a) in enumerate(zip(hits.tolist(), active.tolist())):
        values, start = {}, 1000
        for v, n in enumerate(sizes):
            values[str(v)] = set(range(start, start + n))
            start += n
        active_in = set(range(a - sum(row))).union(*(sorted(values[str(v)])[:h] for v, h in enumerate(row)))
        expected, score = plain_union(active_in, values, most)
        assert (sorted(expected), score) == ([str(v) for v in np.flatnonzero(chosen[i])], best[i])


@pytest.fixture(scope="module")
def crowd():
    "Forty latents of all sorts on 300 prompts of three attributes."
    rng = np.random.default_rng(0)
    attributes = pd.DataFrame({a: rng.choice(list(v), 300) for a, v in (("A", "abcdefgh"), ("B", "xy"), ("C", "pqr"))})
    aim = [p.holds(attributes) for p in predicates(attributes)[0][:40]]
    return interpret(active_of(np.stack(aim, 1) ^ (rng.random((300, 40)) < np.linspace(0, 0.4, 40))), attributes)


def test_numbers_have_the_intervals_of_a_bootstrap_over_scoring_prompts(crowd):
    for i in (0, 7, 25, 39):
        row = crowd.table[crowd.table.latent == crowd.activity.index[i]].iloc[0]
        assert tuple(row[["f1", "lo", "hi"]]) == pytest.approx(interval(crowd.hits(slice(i, i + 1)), f1)[:3], abs=1e-9)
    for kind, found in crowd.counts(0.6).items():
        mine = torch.tensor([p.kind == kind for p in crowd.predicates])
        some = Hits(*(x[:, mine] for x in crowd.hits()))
        within = 0, int(mine.sum())
        expected = interval(some, lambda means: (f1(means) >= 0.6 - 1e-9).sum(-1).double(), within=within)
        assert found == pytest.approx(expected)
    assert crowd.table.f1.is_monotonic_decreasing and len(crowd.table) == 40
    assert crowd.coverage_table().loc["B", "always"] == 1 and crowd.coverage_table().loc["A", "always"] == 0


def test_blocks_of_latents_change_nothing(crowd, monkeypatch):
    monkeypatch.setattr("sage_nb.measures.interpretability._LATENTS_AT_ONCE", 7)
    again = interpret(crowd.activity, crowd.attributes, crowd.scoring)
    assert again.predicates == crowd.predicates
    pd.testing.assert_frame_equal(again.table, crowd.table)
    assert again.counts() == crowd.counts()


# Latents that are predicates, and latents that are nothing

@pytest.mark.parametrize("seed", range(3))
def test_a_dictionary_as_sae_is_its_own_interpretation_and_chance_is_not(seed):
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    values = {"IO": [f"name{i}" for i in range(12)], "S": [f"other{i}" for i in range(12)], "Pos": ["ABB", "BAB"]}
    attributes = pd.DataFrame({a: rng.choice(v, 400) for a, v in values.items()})
    features = tuple(Features((a,), tuple((value,) for value in v), torch.randn(len(v), 64, generator=g),
                              torch.ones(len(v)), 1.0) for a, v in values.items())
    d = Dictionary(torch.randn(64, generator=g), features)
    sae = supervised_as_sae(d, HERE)
    codes = sae.encode(d.reconstruct(attributes))
    found = interpret(Activity.of_codes(codes, HERE), attributes, seed=seed)
    assert [str(p) for p in found.predicates] == [f"{a} = {value}" for a, v in values.items() for value in v]
    assert (found.f1_scored == 1).all() and found.coverage(1.0).value == 1
    assert found.counts(1.0)["value"].value == 26
    drawn = codes._replace(indices=torch.randint(26, codes.indices.shape, generator=g))
    chance = interpret(Activity.of_codes(drawn, HERE), attributes, seed=seed)
    assert chance.f1_scored.max() < 0.8
    assert chance.coverage(attribute="IO").value == 0 and chance.coverage(attribute="S").value == 0


def test_the_planted_attribute_is_covered_through_the_model():
    planted = planted_circuit()
    task = planted.task(192)
    node = Node("v", 1, 1, "second+1")  # where the note of the first name is read, and nothing else
    truth = fit_dictionaries(planted.model, task, [node])
    saes = SAESet("supervised", {node: supervised_as_sae(truth[node], node)})
    found = interpret(activity(planted.model, task.prompts, [node], saes), task.attributes, task.held_out)
    assert found.coverage(attribute="first").value == 1
    firsts = [i for i, p in enumerate(found.predicates) if p.conditions[0].attribute == "first"]
    assert len(firsts) >= 8 and sum(found.f1_scored[firsts] == 1) >= 8
    table = occlusion(found, truth, [node])
    assert table.index[0] == "first" and table.norm["first"] > 100 * table.norm["second"]


# Activity and kept latents, through the model

def test_activity_at_z_is_that_of_any_token_before(model, task, sae_sets):
    node, saes, some = Node("z", 2, 1, "END"), sae_sets["tiny-gpt2-res-topk"], task[:20]
    found = activity(model, some.prompts, [node], saes, batch_size=7)
    stream = capture(model, some.prompts, [Node("resid_pre", 2)])[Node("resid_pre", 2)]
    dense = saes.before(2).dense_encode(stream)
    for i, end in enumerate(some.prompts.index("END").tolist()):
        expected = (dense[i, : end + 1] != 0).any(0).nonzero()[:, 0].tolist()
        assert found.index[found.on[[i]].toarray()[0] > 0].tolist() == expected


def test_activity_does_not_depend_on_batches_or_the_order_of_nodes(model, task, sae_sets):
    nodes, saes, some = [Node.parse(n) for n in ("L3H2.v@IO", "L2H1.z@END")], sae_sets["tiny-gpt2-res-topk"], task[:20]
    found, builder = activity(model, some.prompts, nodes, saes), ActivityBuilder()
    for node in nodes[::-1]:
        for rows in reversed([*some.prompts.slices(7)]):
            builder.add(rows, decompose(model, some.prompts[rows], [node], saes)[node].by_latent())
    again = builder.build(20)
    assert again.places == found.places and again.names == found.names
    assert (again.on != found.on).nnz == 0
    with pytest.raises(ValueError, match="no nodes"): ActivityBuilder().build(20)


@pytest.mark.parametrize("text", ["L2H1.z@END", "L3H2.v@IO"])
def test_min_share_keeps_latents_that_make_up_so_much(model, task, sae_sets, text):
    node, saes, some = Node.parse(text), sae_sets["tiny-gpt2-res-topk"], task[:12]
    found = activity(model, some.prompts, [node], saes, min_share=0.1)
    parts = decompose(model, some.prompts, [node], saes)[node]
    for i in range(len(some)):
        terms = {}
        for latent, term in zip(parts.indices[i].tolist(), parts.latents[i]):
            terms[latent] = terms.get(latent, 0) + term.double()
        whole = sum(terms.values())
        shares = {latent: (term @ whole / (whole @ whole)).item() for latent, term in terms.items()}
        assert sum(shares.values()) == pytest.approx(1)
        large = {latent for latent, share in shares.items() if share >= 0.1}
        assert set(found.index[found.on[[i]].toarray()[0] > 0]) == large


def test_sections_across_layers_name_latents_by_place(model, task, sae_sets):
    nodes = [Node.parse(n) for n in ("L3H2.v@IO", "L3H0.v@IO", "L1H0.v@IO")]
    saes = sae_sets["tiny-gpt2-res-topk"]
    found = activity(model, task.prompts, nodes, saes)
    alone = [activity(model, task.prompts, [n], saes) for n in nodes]
    assert found.places == (alone[2].places[0], alone[0].places[0]) and alone[0].places == alone[1].places
    for p, one in ((1, alone[0]), (1, alone[1]), (0, alone[2])):
        assert found.index[found.place == p].tolist() == one.index.tolist()
        assert (found.on[:, found.place == p] != one.on).nnz == 0


def tied():
    "Two SAEs with latents of equal F1 for a value where they are found, which differ where they are scored."
    attributes = pd.DataFrame({"A": list("xxxxyyyyzzzz" * 2)})
    scoring = np.arange(24) >= 12
    latents = {("L1", 7): [0, 1, 12, 13, 14, 15], ("L1", 3): [2, 3, 20], ("L2", 7): [0, 3, 4, 5, 16],
               ("L2", 9): [4, 5, 16, 17], ("L2", 1): [6, 7, 21], ("L1", 5): [8, 9, 10, 11], ("L2", 0): [8, 9, 10, 22]}
    return attributes, scoring, latents


@given(st.randoms(use_true_random=False))
def test_coverage_does_not_depend_on_how_places_and_latents_are_numbered(random):
    attributes, scoring, latents = tied()
    nodes = {"L1": Node("resid_pre", 1), "L2": Node("resid_pre", 2)}

    def found(order, numbers, places):
        entries = [(p, places.index(layer), numbers[layer, i]) for layer, i in order for p in latents[layer, i]]
        prompt, place, index = np.array(entries).T
        listed = tuple(nodes[name] for name in places)
        return interpret(Activity.of_entries(prompt, place, index, listed, 24), attributes, scoring)
    plain = found(list(latents), {key: key[1] for key in latents}, ["L1", "L2"])
    order, places, numbers = list(latents), ["L1", "L2"], list(range(20))
    for things in (order, places, numbers): random.shuffle(things)
    other = found(order, {key: numbers[i] for i, key in enumerate(latents)}, places)
    assert other.coverage() == plain.coverage()
    for one, another in zip(plain.hits_of_values(), other.hits_of_values()): assert torch.equal(one, another)


def test_the_coverage_of_a_section_does_not_depend_on_the_order_of_its_nodes(model, task, sae_sets):
    nodes = [Node.parse(n) for n in ("L3H2.v@IO", "L1H0.v@IO", "L2H1.z@END")]
    one, other = (interpret(activity(model, task.prompts, some, sae_sets["tiny-gpt2-res-topk"]),
                            task.attributes, task.held_out) for some in (nodes, nodes[::-1]))
    assert one.coverage_table().equals(other.coverage_table())
    assert one.counts() == other.counts() and one.table.equals(other.table)


def test_numbers_of_latents_lie_in_their_intervals_where_resamples_lose_rare_ones():
    n = 200  # latents that are active in one scoring prompt each are lost in a third of the resamples
    attributes = pd.DataFrame({"A": [f"v{i}" for i in range(n)] * 2})
    found = interpret(active_of(np.tile(np.eye(n, dtype=bool), (2, 1))), attributes, np.arange(2 * n) >= n)
    count, covered = found.counts()["value"], found.coverage()
    lost = n - sum(resample_counts(n).min(0).values > 0).item()
    assert lost == n  # every one of them is lost in some resample
    assert count.value == n and count.hi == n and count.lo < 0.75 * n
    assert covered.lo <= covered.value <= covered.hi <= 1
    few = interpret(active_of(np.tile(np.eye(n, dtype=bool)[:, :n // 2], (2, 1))), attributes, np.arange(2 * n) >= n)
    share = few.coverage()
    assert share.lo <= 0.5 == share.value <= share.hi


@pytest.mark.parametrize("rest", ["mean", "zero"])
def test_kept_latents_equal_a_plain_sum(model, task, sections, truth, sae_sets, rest):
    section, saes = next(s for s in sections if s.name == "IO:v@IO"), sae_sets["tiny-gpt2-res-topk"]
    bench = set_up(model, task[~task.held_out | (torch.arange(len(task)) % 2 == 0)], section, truth)
    found = interpret(activity(model, task.prompts, section.nodes, saes), task.attributes, task.held_out)
    kept = keep_interpretable(bench, saes, found, [0.0, 0.5, 0.9], rest)
    good = {name: score for name, score in zip(found.activity.names, found.f1_scored.tolist())}
    expected = {}
    for node in section.nodes:
        parts = decompose(model, bench.task.prompts, [node], saes)[node]
        rows = []
        for i in range(len(bench.task)):
            scores = [good.get(f"{parts.saes[0]} #{latent}", 0) for latent in parts.indices[i].tolist()]
            rows.append(parts.latents[i, torch.tensor(scores) < 0.5].sum(0))
        d = torch.stack(rows)
        expected[node] = parts.reconstruction - d + (d.mean(0) if rest == "mean" else 0)
    assert_close(kept[0.5], faithfulness(bench, expected), rtol=1e-3, atol=1e-3)
    whole = reconstruct(model, bench.task.prompts, section.nodes, saes)
    assert_close(kept[0.0], faithfulness(bench, whole), rtol=1e-3, atol=1e-3)
    assert not torch.equal(kept[0.0].reconstructed, kept[0.9].reconstructed)


def test_runs_are_reused_where_nothing_is_dropped_in_between(model, task, sections, truth, sae_sets):
    section, saes = next(s for s in sections if s.name == "IO:v@IO"), sae_sets["tiny-gpt2-res-topk"]
    bench = set_up(model, task, section, truth).at(slice(0, 8))
    found = interpret(activity(model, task.prompts, section.nodes, saes), task.attributes, task.held_out)
    gap = next(s for s in sorted(set(found.f1_scored.tolist())) if s > 0.3)
    kept = keep_interpretable(bench, saes, found, [gap + 1e-6, gap + 2e-6, 1.5, 2.0])
    assert kept[gap + 1e-6] is kept[gap + 2e-6] and kept[1.5] is kept[2.0] and kept[gap + 2e-6] is not kept[1.5]
    other = set_up(model, task, next(s for s in sections if s.site == "q"), truth).at(slice(0, 8))
    elsewhere = interpret(activity(model, task.prompts, [Node.parse("L0H0.v@IO")], saes), task.attributes)
    with pytest.raises(ValueError, match="were not interpreted"): keep_interpretable(other, saes, elsewhere)


# Faults and edges

def test_names_are_escaped():
    attributes = pd.DataFrame({"<b>A": ["<script>", "& co"] * 10})
    found = interpret(active_of(np.array([[True, False], [False, True]] * 10)), attributes)
    assert found.table.predicate.iloc[0].startswith("<b>A = ")
    html = found._repr_html_()
    assert "&lt;script&gt;" in html and "<script>" not in html and "<b>" not in html


def test_an_sae_without_active_latents_covers_nothing():
    attributes = pd.DataFrame({"A": ["x", "y"] * 10})
    found = interpret(active_of(np.zeros((20, 5), dtype=bool)), attributes)
    assert len(found.activity) == 0 and len(found.table) == 0
    assert found.coverage().value == 0 and all(e.value == 0 for e in found.counts().values())
    assert found.best_latents.tolist() == [-1, -1]
    assert oversplitting(found, "A").latents.tolist() == [0, 0]


def test_a_value_that_is_not_scored_is_left_out_of_coverage():
    attributes = pd.DataFrame({"A": ["x"] * 8 + ["y"] * 8 + ["z"] * 4})
    scoring = np.array(([True] * 4 + [False] * 4) * 2 + [False] * 4)
    on = np.stack([attributes.A == "x", np.arange(20) < 3], 1)
    found = interpret(active_of(on), attributes, scoring)
    assert found.coverage().value == 0.5  # of x and y; z occurs only where it is found
    assert found.predicates[1] is None and found.f1_scored[1] == 0  # active in scoring prompts only
    assert share_covered(Hits(*torch.tensor([[0.0, 0.2], [0.1, 0.2], [0.0, 0.2]]))).item() == 1


@pytest.mark.parametrize("how, what", [
    (dict(attributes=pd.DataFrame({"A": ["x"] * 9})), "activity is of 10 prompts, attributes of 9"),
    (dict(attributes=pd.DataFrame({"A": ["x"] * 10}), scoring=np.ones(10)), "of 10 prompts 10 are to score on"),
])
def test_wrong_inputs_are_refused(how, what):
    with pytest.raises(ValueError, match=what): interpret(active_of(np.eye(10, dtype=bool)), **how)
