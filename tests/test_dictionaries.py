"""Supervised dictionaries, against NumPy's least squares and planted features."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import sage_nb.dictionaries as room
from sage_nb.activations import Node, Prompts, capture
from sage_nb.dictionaries import _Sums, fit_dictionaries, one_hot, variance_explained

NODE = Node("z", 0, 0, "END")


def indicators(attributes, values):
    "One column per attribute value, by comparison."
    return np.stack([(attributes[a] == v).to_numpy(float) for a in values for v in values[a]], 1)


def planted(n, seed, noise=1.0, d=24, sizes=(8, 5), balanced=False):
    "Activations that are a mean, a vector per value and noise; and what every combination of values is without noise."
    rng, grid = np.random.default_rng(seed), np.indices(sizes).reshape(len(sizes), -1).T
    codes = grid[np.arange(n) % len(grid)] if balanced else np.stack([rng.integers(s, size=n) for s in sizes], 1)
    features = np.random.default_rng(0)
    vectors, mean = [features.normal(size=(s, d)) for s in sizes], features.normal(size=d)

    def frame(c): return pd.DataFrame({name: [f"{name}{i}" for i in c[:, j]] for j, name in enumerate("AB")})

    def clean(c): return mean + sum(u[c[:, j]] for j, u in enumerate(vectors))
    return frame(codes), clean(codes) + noise * rng.normal(size=(n, d)), frame(grid), clean(grid)


def fit(monkeypatch, attributes, x, method="mse"):
    "Fit through the public call, the rows of x standing in for a model's activations."
    rows = torch.arange(len(x))
    half = SimpleNamespace(attributes=attributes, prompts=Prompts(rows[:, None], {"END": torch.zeros_like(rows)}))
    task = SimpleNamespace(attributes=attributes, train=half, test=half)

    def rows_of_x(model, prompts, nodes, batch_size): return {n: torch.tensor(x)[prompts.tokens[:, 0]] for n in nodes}
    monkeypatch.setattr(room, "capture", rows_of_x)
    return fit_dictionaries(None, task, [NODE], method)[NODE]


@pytest.mark.parametrize("correlated", [False, True])
def test_mse_dictionary_equals_numpy_least_squares(monkeypatch, correlated):
    attributes, x, grid, _ = planted(700, 1)  # more rows than one chunk of the stream
    if correlated: attributes.loc[::3, "B"] = "B" + attributes.A.str[1].astype(int).mod(5).astype(str)
    found = fit(monkeypatch, attributes, x)
    C = indicators(attributes, found.values)
    solution, *_ = np.linalg.lstsq(C, x - x.mean(0), rcond=None)  # the one of least norm, as the columns are dependent
    assert_close(found.mean, torch.from_numpy(x.mean(0)))
    assert_close(torch.cat(list(found.vectors.values())), torch.from_numpy(solution), rtol=1e-8, atol=1e-10)
    predicted = torch.from_numpy(x.mean(0) + indicators(grid, found.values) @ solution)
    assert_close(found.reconstruct(grid), predicted, rtol=1e-8, atol=1e-10)


def test_mse_dictionary_of_a_model_equals_numpy_least_squares(model, task):
    nodes = [Node("z", 3, 2, "END"), Node("v", 0, 0, "S2")]
    truth = fit_dictionaries(model, task, nodes)
    train, test = (capture(model, half.prompts, nodes) for half in (task.train, task.test))
    for node in nodes:
        x, values = train[node].double().numpy(), truth[node].values
        solution, *_ = np.linalg.lstsq(indicators(task.train.attributes, values), x - x.mean(0), rcond=None)
        predicted = torch.from_numpy(x.mean(0) + indicators(task.test.attributes, values) @ solution).float()
        assert_close(truth[node].reconstruct(task.test.attributes), predicted)
        y = test[node]
        r2 = 1 - (y - predicted).square().sum() / (y - train[node].mean(0)).square().sum()
        assert truth.fit.set_index("node").r2[str(node)] == pytest.approx(r2.item(), abs=1e-5)


def test_mean_dictionary_is_the_mean_of_each_value(monkeypatch):
    attributes, x, _, _ = planted(300, 2)
    found = fit(monkeypatch, attributes, x, "mean")
    for a, values in found.values.items():
        for value, vector in zip(values, found.vectors[a]):
            assert_close(vector, torch.from_numpy(x[(attributes[a] == value).to_numpy()].mean(0) - x.mean(0)))


def test_mean_and_mse_agree_exactly_where_attributes_are_independent(monkeypatch):
    attributes, x, grid, _ = planted(400, 3, balanced=True)
    mean, mse = (fit(monkeypatch, attributes, x, method).reconstruct(grid) for method in ("mean", "mse"))
    assert_close(mean, mse, rtol=1e-8, atol=1e-10)
    attributes["B"] = "B" + attributes.A.str[1].astype(int).mod(5).astype(str)
    mean, mse = (fit(monkeypatch, attributes, x, method).reconstruct(attributes) for method in ("mean", "mse"))
    assert (mean - mse).abs().max() > 0.5, "where one attribute determines the other, means count the shared part twice"


@given(cuts=st.lists(st.integers(0, 200), max_size=6), method=st.sampled_from(["mean", "mse"]))
def test_streaming_in_any_batches_gives_the_same(cuts, method):
    attributes, x, _, _ = planted(200, 4)
    x, values = torch.tensor(x), {a: sorted(attributes[a].unique()) for a in attributes}
    whole, parts = _Sums(values), _Sums(values)
    whole.add(attributes, x)
    edges = [0, *sorted(cuts), 200]
    for start, stop in zip(edges, edges[1:]): parts.add(attributes[start:stop], x[start:stop])
    for ours, theirs in zip(parts.solve(method), whole.solve(method)): assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


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
    assert torch.equal(one_hot(attributes, {"A": ["y", "x"], "B": ["0", "1"]}), expected)


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
    with pytest.raises(ValueError, match="method 'median' is not one of mean, mse"):
        fit(monkeypatch, attributes, x, "median")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="there are no nodes to fit"): fit_dictionaries(model, task, [])
    truth = fit_dictionaries(model, task, [NODE])
    with pytest.raises(ValueError, match="node L1H0.z@END has no dictionary"): truth[Node("z", 1, 0, "END")]
