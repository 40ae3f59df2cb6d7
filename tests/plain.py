"""What several tests compare with: one prompt at a time, one latent at a time, in plain loops."""
from fractions import Fraction

import numpy as np
import torch

from sage_nb.core.activations import capture
from sage_nb.saes.reconstruction import decompose


# The model, one prompt at a time

def patched(model, task, values, i):
    "Logits at END of prompt i when the nodes have these values, by hooks written out."
    def hook(node, value):
        def put(x, hook):
            x = x.clone()
            x[0, task.prompts.positions[node.position][i], node.head] = value
            return x
        return node.hook, put
    with torch.no_grad(), model.hooks(fwd_hooks=[hook(node, v) for node, v in values.items()]):
        return model(task.prompts.tokens[i : i + 1])[0, task.prompts.positions["END"][i]]


def run_cost(bench, rows=None):
    "What running some prompts on the section costs, in whole prompts: its layers up, its tokens from the first to END."
    prompts, nodes = bench.task.prompts if rows is None else bench.task.prompts[rows], bench.section.nodes
    if not len(prompts): return 0.0
    widest, n_pos = 0, prompts.tokens.shape[1]
    for i, end in enumerate(prompts.positions["END"].tolist()):
        first = min(prompts.positions[node.position][i].item() for node in nodes)
        widest = max(widest, end - first + 1)
    layers = 1 - min(node.layer for node in nodes) / bench.model.cfg.n_layers
    return len(prompts) * layers * widest / n_pos


def read_share(bench):
    "The share of the model's layers that reading the section's nodes takes."
    return (max(node.layer for node in bench.section.nodes) + 1) / bench.model.cfg.n_layers


def nearest(truth, acts, attribute):
    "Which value of an attribute is nearest to the activations of one prompt, tried one after the other."
    away = []
    for j in range(len(truth[next(iter(acts))][attribute].values)):
        at = {node: truth[node].mean + truth[node][attribute].centred[j] for node in acts}
        away.append(sum((x - at[node]).square().sum() for node, x in acts.items()))
    return int(torch.stack(away).argmin())


def plain_readable(bench):
    "The other attributes that can be read, half-way at least between guessing and being always right."
    rows, truth, first, readable = bench.task.attributes.to_dict("records"), bench.truth, bench.section.nodes[0], []
    for b in bench.task.attributes.columns.drop(bench.section.attribute):
        values, counts = truth[first][b].values, truth[first][b].counts
        acts = [{node: x[i] for node, x in bench.acts.items()} for i in range(len(rows))]
        right = np.mean([values[nearest(truth, a, b)] == (row[b],) for a, row in zip(acts, rows)])
        chance = counts.max() / counts.sum()
        if counts.numel() > 1 and right - chance >= 0.5 * (1 - chance): readable.append(b)
    return readable


def kept_share(bench, edited, i, others):
    "The share of other attributes that prompt i keeps when it is edited, but for what the counterfactual changes too."
    source, goal = ({node: acts[node][i] for node in bench.section.nodes} for acts in (bench.acts, bench.goal))
    kept = []
    for b in others:
        before, after, there = (nearest(bench.truth, acts, b) for acts in (source, edited, goal))
        kept.append(before == after or before != there)
    return np.mean(kept) if kept else np.nan


# Units, one latent at a time

def added(decomposition):
    "For each prompt what each latent adds, its tokens summed: (place of its SAE, its number) -> vector."
    prompts = []
    for terms, indices, origin in zip(decomposition.latents, decomposition.indices, decomposition.origin):
        here = {}
        for term, index, place in zip(terms.double().numpy(), indices.tolist(), origin.tolist()):
            unit = decomposition.saes[place], index
            here[unit] = here.get(unit, 0) + term
        prompts.append({unit: c for unit, c in here.items() if c.any()})
    return prompts


def only_on(prompts, spread):
    "The same without what is smaller than a twentieth of the sum and of the activations' spread."
    kept = []
    for here in prompts:
        whole = np.linalg.norm(sum(here.values(), np.zeros(1)))
        kept.append({unit: c for unit, c in here.items() if np.linalg.norm(c) >= 0.05 * max(whole, spread)})
    return kept


def plain_spread(x):
    "The root of the mean squared distance to the mean."
    x = x.double().numpy()
    return float(np.mean([((row - x.mean(0)) ** 2).sum() for row in x]) ** 0.5)


def centred(features):
    "The vector of each value less their mean over the training prompts."
    vectors, counts = features.weight * features.vectors.double().numpy(), features.counts.tolist()
    return vectors - sum(n * u for n, u in zip(counts, vectors)) / sum(counts)


def share_along(c, u):
    "How many times u lies in c."
    return float(c @ u) / float(u @ u) if (u != 0).any() else 0.0


def exact_kappa(both, on, holds, n):
    "Cohen's kappa from numbers of prompts, as a fraction."
    most = (on + holds) * n - 2 * on * holds
    return Fraction(2 * (both * n - on * holds), most) if most else Fraction(0)


def prompts_by(keys_of_prompts):
    "key -> the numbers of the prompts that have it."
    found = {}
    for p, keys in enumerate(keys_of_prompts):
        for key in keys: found.setdefault(key, set()).add(p)
    return found


def plain_numbers(prompts, on, values, vectors):
    "unit -> by value: κ, carry, share, precision, recall; `values` has the number of each prompt's value, or -1."
    n, numbers, active, having = len(on), {}, prompts_by(on), prompts_by([value] for value in values)
    whole = [sum(here.values(), np.zeros(1)) for here in prompts]
    for unit in sorted(active):
        numbers[unit] = []
        for v, u in enumerate(vectors):
            many, has = active[unit], having.get(v, set())
            both = sorted(many & has)
            carried = [min(max(share_along(on[p][unit], u), 0), 1) for p in both]
            shares = [share_along(on[p][unit], whole[p]) for p in both]
            numbers[unit].append((
                exact_kappa(len(both), len(many), len(has), n), sum(carried) / max(len(both), 1),
                sum(shares) / max(len(has), 1), len(both) / len(many), len(both) / max(len(has), 1)))
    return numbers


def plain_ranking(on, numbers, v):
    "The units with κ of a tenth or more for a value, by falling κ, then share, then by the prompts they are on in."
    def place(unit):
        kappa, _, share, _, _ = numbers[unit][v]
        return -kappa, -round(share / 1e-3), sum((p + 1) ** 0.5 for p in active[unit])
    active = prompts_by(on)
    return sorted((unit for unit in numbers if numbers[unit][v][0] >= Fraction(1, 10)), key=place)


class PlainUnits:
    "Everything about the units of an SAE set at one node, for one attribute."

    def __init__(self, bench, task, saes, node):
        features = bench.truth[node][bench.section.attribute]
        labels = [value for value, in features.values]
        self.vectors = centred(features)
        spread = plain_spread(capture(bench.model, task.train.prompts, [node])[node])
        for name, some in (("train", task.train), ("test", bench.task)):
            parts = decompose(bench.model, some.prompts, [node], saes)[node]
            values = [labels.index(value) for value in some.attributes[features.name]]
            everything = added(parts)
            setattr(self, name, everything)
            setattr(self, f"{name}_on", only_on(everything, spread))
            setattr(self, f"{name}_values", values)
        self.bias = parts.bias.double().numpy()
        self.numbers = plain_numbers(self.train, self.train_on, self.train_values, self.vectors)
        self.rankings = [plain_ranking(self.train_on, self.numbers, v) for v in range(len(labels))]
        self.named = self._named(task.train.attributes)

    def _named(self, attributes):
        "The units with κ of a tenth or more for some value of some attribute."
        active, named = prompts_by(self.train_on), set()
        for name in attributes:
            for has in prompts_by([value] for value in attributes[name]).values():
                named |= {unit for unit, many in active.items()
                          if exact_kappa(len(many & has), len(many), len(has), len(attributes)) >= Fraction(1, 10)}
        return named

    def mean_added(self, unit, v):
        "What a unit adds on average in training prompts with a value, 0 where it is off."
        mine = [here.get(unit, 0) for here, value in zip(self.train_on, self.train_values) if value == v]
        return sum(mine) / len(mine)

    def exchange(self, i, v, j):
        "What is added to the activation of held-out prompt i when the first j units of its value make room for v's."
        here, old = self.test_on[i], self.rankings[self.test_values[i]][:j]
        return sum(self.mean_added(unit, v) for unit in self.rankings[v][:j]) - sum(here.get(unit, 0) for unit in old)
