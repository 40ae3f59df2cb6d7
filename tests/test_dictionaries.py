"""Supervised dictionaries, against NumPy's least squares and planted features."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import sage_nb.truth.dictionaries as room
from sage_nb.core.activations import Node, Prompts, capture
from sage_nb.core.models import load_model
from sage_nb.truth.dictionaries import (FIT_METHODS, Dictionaries, _solve, _Sums, fit_dictionaries, one_hot,
                                        suggest_products, text_digest, variance_explained)
from sage_nb.truth.features import Term, terms_of
from sage_nb.truth.runs import set_up

NODE = Node("z", 0, 0, "END")


class Half(SimpleNamespace):
    "What stands in for the training or the held-out prompts of a task."
    def __len__(self): return len(self.attributes)


def half_of(attributes):
    "Prompts of one token, their own row."
    rows = torch.arange(len(attributes))
    prompts = Prompts(rows[:, None], {"END": torch.zeros_like(rows)})
    return Half(attributes=attributes, prompts=prompts, texts=[f"prompt {i}" for i in rows.tolist()])


def indicators(attributes, terms):
    "One column per value of the attributes, by comparison."
    columns = []
    for term in terms:
        (name,) = term.attributes
        columns += [(attributes[name] == value).to_numpy(float) for (value,) in term.values]
    return np.stack(columns, 1)


def planted(n, seed, noise=1.0, d=24, sizes=(8, 5), balanced=False):
    "Activations that are a mean, a vector per value and noise; and what every combination of values is without noise."
    rng, grid = np.random.default_rng(seed), np.indices(sizes).reshape(len(sizes), -1).T
    if balanced: codes = grid[np.arange(n) % len(grid)]
    else: codes = np.stack([rng.integers(s, size=n) for s in sizes], 1)
    features = np.random.default_rng(0)
    vectors, mean = [features.normal(size=(s, d)) for s in sizes], features.normal(size=d)

    def frame(c): return pd.DataFrame({"A": [f"A{i}" for i in c[:, 0]], "B": [f"B{i}" for i in c[:, 1]]})

    def clean(c): return mean + sum(u[c[:, j]] for j, u in enumerate(vectors))
    return frame(codes), clean(codes) + noise * rng.normal(size=(n, d)), frame(grid), clean(grid)


def fit(monkeypatch, attributes, x, method="mse", **more):
    "Fit through the public call, the rows of x standing in for a model's activations."
    half = half_of(attributes)
    task = SimpleNamespace(attributes=attributes, train=half, test=half, require=lambda model: None)

    def rows_of_x(model, prompts, nodes, batch_size): return {n: torch.tensor(x)[prompts.tokens[:, 0]] for n in nodes}
    monkeypatch.setattr(room, "capture", rows_of_x)
    monkeypatch.setattr(room, "model_hash", lambda model: "no model")
    return fit_dictionaries(None, task, [NODE], method, **more)[NODE]


@pytest.mark.parametrize("correlated", [False, True])
def test_mse_dictionary_equals_numpy_least_squares(monkeypatch, correlated):
    attributes, x, grid, _ = planted(700, 1)  # more rows than one chunk of the stream
    if correlated: attributes.loc[::3, "B"] = "B" + attributes.A.str[1].astype(int).mod(5).astype(str)
    found = fit(monkeypatch, attributes, x)
    C = indicators(attributes, found.features)
    solution, *_ = np.linalg.lstsq(C, x - x.mean(0), rcond=None)  # the one of least norm, as the columns are dependent
    assert_close(found.mean, torch.from_numpy(x.mean(0)))
    assert_close(torch.cat([f.vectors for f in found.features]), torch.from_numpy(solution), rtol=1e-8, atol=1e-10)
    predicted = torch.from_numpy(x.mean(0) + indicators(grid, found.features) @ solution)
    assert_close(found.reconstruct(grid), predicted, rtol=1e-8, atol=1e-10)


def test_mse_dictionary_of_a_model_equals_numpy_least_squares(model, task):
    nodes = [Node("z", 3, 2, "END"), Node("v", 0, 0, "S2")]
    truth = fit_dictionaries(model, task, nodes)
    train, test = (capture(model, half.prompts, nodes) for half in (task.train, task.test))
    for node in nodes:
        x, terms = train[node].double().numpy(), truth[node].features
        solution, *_ = np.linalg.lstsq(indicators(task.train.attributes, terms), x - x.mean(0), rcond=None)
        predicted = torch.from_numpy(x.mean(0) + indicators(task.test.attributes, terms) @ solution).float()
        assert_close(truth[node].reconstruct(task.test.attributes), predicted)
        y = test[node]
        r2 = 1 - (y - predicted).square().sum() / (y - train[node].mean(0)).square().sum()
        assert truth.fit.set_index("node").r2[str(node)] == pytest.approx(r2.item(), abs=1e-5)


def test_mean_dictionary_is_the_mean_of_each_value(monkeypatch):
    attributes, x, _, _ = planted(300, 2)
    found = fit(monkeypatch, attributes, x, "mean")
    for name in attributes:
        for (value,), vector in zip(found[name].values, found[name].vectors):
            assert_close(vector, torch.from_numpy(x[(attributes[name] == value).to_numpy()].mean(0) - x.mean(0)))


def test_mean_and_mse_agree_exactly_where_attributes_are_independent(monkeypatch):
    attributes, x, grid, _ = planted(400, 3, balanced=True)
    mean, mse = (fit(monkeypatch, attributes, x, method).reconstruct(grid) for method in ("mean", "mse"))
    assert_close(mean, mse, rtol=1e-8, atol=1e-10)
    attributes["B"] = "B" + attributes.A.str[1].astype(int).mod(5).astype(str)
    mean, mse = (fit(monkeypatch, attributes, x, method).reconstruct(attributes) for method in ("mean", "mse"))
    assert (mean - mse).abs().max() > 0.5, "where one attribute determines the other, means count the shared part twice"


@given(cuts=st.lists(st.integers(0, 200), max_size=6), method=st.sampled_from(FIT_METHODS))
def test_streaming_in_any_batches_gives_the_same(cuts, method):
    attributes, x, _, _ = planted(200, 4)
    x, terms, edges = torch.tensor(x), terms_of(attributes, [("A", "B")]), [0, *sorted(cuts), 200]
    whole = _Sums.of(terms, attributes, {NODE: x})
    parts = [_Sums.of(terms, attributes[start:stop], {NODE: x[start:stop]}) for start, stop in zip(edges, edges[1:])]
    ours, theirs = _solve(sum(parts[1:], parts[0]), NODE, method), _solve(whole, NODE, method)
    assert_close(ours.mean, theirs.mean, rtol=1e-8, atol=1e-9)
    assert [f.attributes for f in ours.features] == [("A",), ("B",), ("A", "B")]
    for own, other in zip(ours.features, theirs.features):
        assert_close(own.vectors, other.vectors, rtol=1e-8, atol=1e-9)
        assert_close(own.weight, other.weight, rtol=1e-8, atol=1e-9)
        assert torch.equal(own.counts, other.counts)


def test_error_of_a_planted_dictionary_falls_like_one_over_root_n(monkeypatch):
    error = []
    for n in (500, 2000, 8000):
        attributes, x, grid, clean = planted(n, n, d=256)
        found = fit(monkeypatch, attributes, x).reconstruct(grid)
        error.append((found - torch.from_numpy(clean)).square().mean().sqrt().item())
    # 12 free vectors of 256 numbers: the error is √(12 / n), known to 1 / √(2 · 3072) = 1.3 %, and a ratio
    # to 1.8 %; the bands are four times that
    assert error == pytest.approx([(12 / n) ** 0.5 for n in (500, 2000, 8000)], rel=0.05)
    for large, small in zip(error, error[1:]): assert large / small == pytest.approx(2, rel=0.07)


def test_planted_dictionary_is_exact_without_noise(monkeypatch):
    attributes, x, grid, clean = planted(300, 5, noise=0.0)
    assert_close(fit(monkeypatch, attributes, x).reconstruct(grid), torch.from_numpy(clean), rtol=1e-9, atol=1e-9)


def test_one_hot_has_a_column_per_value_in_the_given_order():
    attributes = pd.DataFrame({"A": ["x", "y", "x"], "B": ["0", "0", "1"]})
    expected = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1]])
    terms = [Term(("A",), (("y",), ("x",))), Term(("B",), (("0",), ("1",)))]
    assert torch.equal(one_hot(attributes, terms), expected)


def test_variance_explained_equals_numbers_worked_out_by_hand():
    x, mean = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 1.0])
    # squared distances to the mean: 1, 5, 2; to the reconstruction: 0, 1, 1
    found = variance_explained(x, torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 1.0]]), mean)
    assert found.value == pytest.approx(1 - 2 / 8)
    assert variance_explained(x, x, mean)[:3] == (1, 1, 1)
    assert variance_explained(x, mean.expand(3, 2), mean)[:3] == (0, 0, 0)


def test_a_value_that_was_never_seen_is_an_error(monkeypatch):
    attributes, x, _, _ = planted(100, 6)
    found = fit(monkeypatch, attributes, x)
    with pytest.raises(ValueError, match="value 'A99' of attribute 'A' was not in the training prompts"):
        found.reconstruct(pd.DataFrame({"A": ["A0", "A99"], "B": ["B0", "B1"]}))


def test_fitting_refuses_what_it_cannot_do(monkeypatch, model, task):
    attributes, x, _, _ = planted(100, 7)
    with pytest.raises(ValueError, match="method 'median' is not one of mean, weighted, mse"):
        fit(monkeypatch, attributes, x, "median")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="there are no nodes to fit"): fit_dictionaries(model, task, [])
    truth = fit_dictionaries(model, task, [NODE])
    with pytest.raises(ValueError, match="node L1H0.z@END has no dictionary"): truth[Node("z", 1, 0, "END")]


# Weights, products, edits and readings, each against a slow plain form

def design(attributes, products=()):
    "Columns of values and of combinations that occur, by comparison."
    columns = {}
    for a in attributes:
        columns[a] = [(v, (attributes[a] == v).to_numpy(float)) for v in sorted(attributes[a].unique())]
    for a, b in products:
        pairs = sorted(set(zip(attributes[a], attributes[b])))
        masks = [((attributes[a] == v) & (attributes[b] == w)).to_numpy(float) for v, w in pairs]
        columns[f"{a}×{b}"] = list(zip(pairs, masks))
    return columns


def correlated(n, seed, **more):
    attributes, x, grid, clean = planted(n, seed, **more)
    attributes.loc[::3, "B"] = "B" + attributes.A.str[1].astype(int).mod(5).astype(str)
    return attributes, x, grid, clean


@pytest.mark.parametrize("products", [(), (("A", "B"),)])
def test_weights_equal_a_least_squares_fit_of_one_number_per_attribute(monkeypatch, products):
    attributes, x, _, _ = correlated(300, 8)
    found = fit(monkeypatch, attributes, x, "weighted", products=products)
    X, columns = x - x.mean(0), {}
    for name, rows in design(attributes, products).items():
        total = np.zeros_like(X)
        for _, mask in rows: total += np.outer(mask, X[mask > 0].mean(0))
        columns[name] = total
    for a, b in products: columns[f"{a}×{b}"] -= columns[a] + columns[b]
    solution, *_ = np.linalg.lstsq(np.stack([c.ravel() for c in columns.values()], 1), X.ravel(), rcond=None)
    assert [f.name for f in found.features] == list(columns)
    assert [f.weight for f in found.features] == pytest.approx(solution, rel=1e-8)
    expected = x.mean(0) + sum(w * c for w, c in zip(solution, columns.values()))
    assert_close(found.reconstruct(attributes), torch.from_numpy(expected), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("d", [3, 24])
def test_mse_with_products_is_least_squares_with_the_smallest_product_vectors(monkeypatch, d):
    attributes, x, _, _ = correlated(250, 9, d=d)
    attributes["C"] = np.random.default_rng(1).choice(["C0", "C1"], 250)
    products = [("A", "B"), ("B", "C")]
    found, columns = fit(monkeypatch, attributes, x, products=products), design(attributes, products)
    C = np.stack([mask for rows in columns.values() for _, mask in rows], 1)
    best = C @ np.linalg.lstsq(C, x - x.mean(0), rcond=None)[0]
    assert_close(found.contribution(attributes), torch.from_numpy(best), rtol=1e-7, atol=1e-8)
    assert {n: len(v) for n, v in columns.items()} == {f.name: len(f.values) for f in found.features}
    # of all least-squares solutions, the product vectors of least norm: those of the residuals of the product columns
    masks = {name: np.stack([mask for _, mask in rows], 1) for name, rows in columns.items()}
    singles = np.concatenate([masks[f.name] for f in found.features if not f.is_product], 1)
    rest = np.concatenate([masks[f.name] for f in found.products], 1)
    residual = rest - singles @ np.linalg.lstsq(singles, rest, rcond=None)[0]
    expected, *_ = np.linalg.lstsq(residual, x - x.mean(0), rcond=1e-10)
    assert_close(torch.cat([f.vectors for f in found.products]), torch.from_numpy(expected), rtol=1e-7, atol=1e-8)


def test_an_additive_combination_is_the_sum_of_its_attributes(monkeypatch):
    attributes, x, grid, clean = planted(400, 10, noise=0.0)
    absent = (attributes.A == "A3") & (attributes.B == "B2")
    kept, rows = attributes[~absent].reset_index(drop=True), x[~absent.to_numpy()]
    message = "value 'A3×B2' of attribute 'A×B' was not in the training prompts.*unseen='additive'"
    with pytest.raises(ValueError, match=message):
        fit(monkeypatch, kept, rows, products=[("A", "B")]).reconstruct(grid)
    found = fit(monkeypatch, kept, rows, products=[("A", "B")], unseen="additive")
    assert_close(found.reconstruct(grid), torch.from_numpy(clean), rtol=1e-8, atol=1e-8)  # the truth is additive
    new = (grid.A == "A3") & (grid.B == "B2")
    assert found.combined(grid).tolist() == (~new).tolist() and found.knows(grid).all()
    strict = fit(monkeypatch, kept, rows, products=[("A", "B")])
    assert strict.knows(grid).tolist() == (~new).tolist()
    assert strict.knows(grid.replace({"A": {"A0": "A99"}})).sum() == ((grid.A != "A0") & ~new).sum()


@settings(max_examples=20)
@given(seed=st.integers(0, 10), method=st.sampled_from(FIT_METHODS), product=st.booleans())
def test_an_edit_changes_the_reconstruction_of_the_old_row_into_that_of_the_new(seed, method, product):
    with pytest.MonkeyPatch.context() as patch:
        attributes, x, grid, _ = planted(400, seed, balanced=True)
        found = fit(patch, attributes, x, method, products=[("A", "B")] if product else ())
    rng = np.random.default_rng(seed)
    new = rng.choice([value for (value,) in found["A"].values], len(grid)).tolist()
    noise = torch.from_numpy(rng.normal(size=(len(grid), 24)))
    edited = found.edit(found.reconstruct(grid) + noise, "A", grid, new)
    assert_close(edited, found.reconstruct(grid.assign(A=new)) + noise, rtol=1e-9, atol=1e-9)
    back = found.edit(edited, "A", grid.assign(A=new), grid.A)
    assert_close(back, found.reconstruct(grid) + noise, rtol=1e-9, atol=1e-9)
    for i, row in enumerate(grid.itertuples()):  # one vector out, one in, and the products along
        changes = [(found["A"], (row.A,), (new[i],))]
        if product: changes.append((found["A", "B"], (row.A, row.B), (new[i], row.B)))
        plain = 0
        for f, old, now in changes:
            plain = plain + f.weight * (f.vectors[f.values.index(now)] - f.vectors[f.values.index(old)])
        assert_close(edited[i] - found.reconstruct(grid)[i] - noise[i], plain, rtol=1e-9, atol=1e-9)


def test_reading_equals_a_plain_search_and_does_not_depend_on_shared_constants(monkeypatch):
    attributes, x, _, _ = correlated(300, 11)
    found, test = fit(monkeypatch, attributes, x), torch.from_numpy(planted(50, 12)[1])
    for name in attributes:
        values, vectors = [value for (value,) in found[name].values], found[name].vectors
        counts = [int((attributes[name] == value).sum()) for value in values]
        average = sum(c * u for c, u in zip(counts, vectors)) / sum(counts)
        plain = [((test - found.mean - u + average) ** 2).sum(1) for u in vectors]
        assert_close(found.distances(test, name), torch.stack(plain, 1), rtol=1e-9, atol=1e-9)
        expected = [values[min(range(len(values)), key=lambda j: plain[j][i])] for i in range(len(test))]
        assert found.read(test, name) == expected
    moved = replace(found["A"], vectors=found["A"].vectors + 5)
    shifted = replace(found, features=(moved, found["B"]))
    assert shifted.read(test, "A") == found.read(test, "A")
    together = Dictionaries("mse", {NODE: found, NODE._replace(layer=1): shifted}, pd.DataFrame())
    assert together.read({NODE: test, NODE._replace(layer=1): test}, "A") == found.read(test, "A")


def test_values_and_names_may_contain_the_sign_of_products(monkeypatch):
    attributes = pd.DataFrame({"A×": ["x", "x×y", "x", "x×y"] * 50, "B": ["y×z", "z", "z", "y×z"] * 50})
    rng = np.random.default_rng(15)
    vectors = rng.normal(size=(2, 2, 24))  # joined, ("x", "y×z") and ("x×y", "z") would be one value
    x = vectors[(attributes["A×"] == "x×y").astype(int), (attributes["B"] == "z").astype(int)]
    found = fit(monkeypatch, attributes, x, products=[("A×", "B")])
    assert found["A×", "B"].values == (("x", "y×z"), ("x", "z"), ("x×y", "y×z"), ("x×y", "z"))
    assert_close(found.reconstruct(attributes), torch.from_numpy(x), rtol=1e-8, atol=1e-8)
    assert [f.name for f in found.touching("B")] == ["B", "A××B"] and not found["A×"].is_product
    assert found.read(torch.from_numpy(x), "B") == list(attributes["B"])


def test_a_product_that_says_nothing_new_has_vectors_of_0(monkeypatch):
    attributes, x, _, _ = planted(200, 16)
    attributes["B"] = attributes.A.str.replace("A", "B")  # determined by A, so that its combinations are A's values
    plain = fit(monkeypatch, attributes, x)
    more = fit(monkeypatch, attributes, x, products=[("A", "B")], unseen="additive")
    assert_close(more["A", "B"].vectors, torch.zeros(8, 24).double(), rtol=0, atol=1e-9)
    crossed = attributes.assign(B=attributes.B.sample(frac=1, random_state=0).to_numpy())
    assert_close(more.reconstruct(crossed), plain.reconstruct(crossed), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", FIT_METHODS)
def test_an_attribute_of_one_value_adds_nothing(monkeypatch, method):
    attributes, x, _, _ = planted(200, 13)
    plain, more = fit(monkeypatch, attributes, x, method), fit(monkeypatch, attributes.assign(C="C0"), x, method)
    assert_close(more.reconstruct(attributes.assign(C="C0")), plain.reconstruct(attributes), rtol=1e-8, atol=1e-9)
    if method == "weighted": assert more["C"].weight == pytest.approx(0, abs=1e-9)
    assert more.read(torch.from_numpy(x), "C") == ["C0"] * 200
    alone = fit(monkeypatch, attributes[["A"]].assign(A="A0"), x, method)
    mean = torch.from_numpy(x.mean(0)).expand(200, -1)
    assert_close(alone.reconstruct(attributes.assign(A="A0")), mean, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", FIT_METHODS)
def test_more_dimensions_and_more_values_than_prompts(monkeypatch, method):
    attributes, x, _, _ = planted(12, 14, d=300, sizes=(40, 30))
    found = fit(monkeypatch, attributes, x, method)
    C = indicators(attributes, found.features)
    assert C.shape[1] > 12 and np.linalg.matrix_rank(C) <= 12
    assert found.reconstruct(attributes).isfinite().all()
    if method != "mse": return
    expected = torch.from_numpy(C @ np.linalg.lstsq(C, x - x.mean(0), rcond=None)[0])
    assert_close(found.contribution(attributes), expected, rtol=1e-7, atol=1e-8)


def test_products_are_suggested_where_they_are_planted_and_only_there(monkeypatch):
    rng, features = np.random.default_rng(0), np.random.default_rng(1)
    attributes = pd.DataFrame({a: [f"{a}{i}" for i in rng.integers(4, size=600)] for a in "ABC"})
    codes = {a: attributes[a].str[1].astype(int).to_numpy() for a in "ABC"}
    x = sum(features.normal(size=(4, 16))[codes[a]] for a in "ABC") + 0.5 * rng.normal(size=(600, 16))
    interaction = features.normal(size=(4, 4, 16))[codes["A"], codes["B"]]
    other = NODE._replace(layer=1)
    acts, half = {NODE: x + interaction, other: x}, half_of(attributes)
    task = SimpleNamespace(attributes=attributes, train=half, test=half, require=lambda model: None)

    def rows_of_acts(model, prompts, nodes, batch_size):
        return {n: torch.tensor(acts[n])[prompts.tokens[:, 0]] for n in nodes}
    monkeypatch.setattr(room, "capture", rows_of_acts)
    monkeypatch.setattr(room, "model_hash", lambda model: "no model")
    found = suggest_products(None, task, [NODE, other])
    assert found[found.chosen][["node", "product"]].values.tolist() == [[str(NODE), "A×B"]]
    gain = found.set_index(["node", "product"]).gain[str(NODE), "A×B"]
    folds = [np.arange(600) % 5 == i for i in range(5)]  # the same by refitting on the rows of all other folds

    def r2(products, held):
        columns = np.stack([mask for cs in design(attributes, products).values() for _, mask in cs], 1)
        y, mean = acts[NODE], acts[NODE][~held].mean(0)
        u = np.linalg.lstsq(columns[~held], y[~held] - mean, rcond=None)[0]
        return 1 - ((y[held] - mean - columns[held] @ u) ** 2).sum() / ((y[held] - mean) ** 2).sum()
    assert gain == pytest.approx(np.mean([r2([("A", "B")], f) - r2([], f) for f in folds]), rel=1e-6)
    fitted = fit_dictionaries(None, task, [NODE, other], products="auto", unseen="additive")
    assert [f.attributes for f in fitted[NODE].products] == [("A", "B")]
    assert not fitted[other].products and fitted.label == "mse + A×B"
    for wrong, message in ((dict(products="auto"), "unseen='additive'"),
                           (dict(products="all", unseen="additive"), "'all'"),
                           (dict(unseen="guess"), "unseen='guess'"),
                           (dict(products=[("A", "D")]), r"\('A', 'D'\)"),
                           (dict(products=[("A",)]), r"\('A',\)")):
        with pytest.raises(ValueError, match=message): fit_dictionaries(None, task, [NODE], **wrong)


# Whose truth it is

@pytest.fixture(scope="module")
def small_truth(model, task): return fit_dictionaries(model, task, [NODE, Node("v", 1, 2, "S2")])


def test_dictionaries_are_refused_on_another_model(model, task, small_truth):
    small_truth.require(model, task)
    other = load_model("tiny-gpt2")
    list(other.parameters())[-1].data += 1e-3  # one weight is enough
    with pytest.raises(ValueError, match=f"a model of hash {small_truth.model}, and this one has"):
        small_truth.require(other, task)
    replace(small_truth, model="").require(other, task)  # of which it is not known what it was fitted on


def test_dictionaries_are_refused_on_the_prompts_they_were_fitted_on(model, task, small_truth):
    mixed = torch.arange(len(task)) % 2 == 0
    n = int((mixed & ~task.held_out).sum())
    with pytest.raises(ValueError, match=f"^{n} of {int(mixed.sum())} held-out prompts of task 'ioi' were training"):
        small_truth.require(model, replace(task, held_out=mixed))
    assert small_truth.trained_on == {text_digest(text) for text in task.train.texts}
    assert not small_truth.trained_on & {text_digest(text) for text in task.test.texts}


def test_the_digest_changes_with_anything_that_a_dictionary_says(small_truth):
    dictionary = small_truth[NODE]
    first = dictionary.features[0]

    def with_first(**how): return replace(dictionary, features=(replace(first, **how), *dictionary.features[1:]))
    nudged = first.vectors.clone()
    nudged[-1, -1] = torch.nextafter(nudged[-1, -1], torch.tensor(9.0))
    changed = {
        "vector": with_first(vectors=nudged), "weight": with_first(weight=0.999), "values": with_first(
            values=(("Nobody",), *first.values[1:])), "counts": with_first(counts=first.counts + 1),
        "mean": replace(dictionary, mean=dictionary.mean + 1e-6), "unseen": replace(dictionary, unseen="additive"),
        "features": replace(dictionary, features=dictionary.features[:-1])}
    digests = {replace(small_truth, nodes=small_truth.nodes | {NODE: d}).digest for d in changed.values()}
    digests |= {replace(small_truth, method="mean").digest, replace(small_truth, model="other").digest,
                replace(small_truth, nodes={NODE: dictionary}).digest, small_truth.digest}
    assert len(digests) == len(changed) + 4
    assert replace(small_truth, nodes=dict(small_truth.nodes)).digest == small_truth.digest


def test_the_same_call_gives_the_same_digest(model, task, small_truth):
    assert fit_dictionaries(model, task, list(map(str, small_truth.nodes))).digest == small_truth.digest


def test_nan_activations_are_named_and_not_fitted(monkeypatch):
    attributes, x, _, _ = planted(100, 7)
    x[3, 5] = np.nan
    with pytest.raises(ValueError, match="activations at L0H0.z@END hold nan or inf in 1 of 100 prompts"):
        fit(monkeypatch, attributes, x)


@pytest.mark.parametrize("call", [lambda f: fit_dictionaries(f.model, f.task, [NODE]),
                                  lambda f: set_up(f.model, f.task, f.sections[0], f.truth)], ids=["fit", "set up"])
def test_a_task_made_with_another_tokenizer_is_refused(model, task, sections, truth, call):
    call(SimpleNamespace(model=model, task=task, sections=sections, truth=truth))
    foreign = replace(task, tokenizer="0" * 16)
    with pytest.raises(ValueError, match="task 'ioi' was made for another tokenizer"):
        call(SimpleNamespace(model=model, task=foreign, sections=sections, truth=truth))
