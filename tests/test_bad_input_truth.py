"""Wrong calls of the rooms that edit activations, fit the ground truth and check SAEs: each says what is wrong."""
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from sage_nb.core.activations import (Node, Prompts, capture, count_passes, differentiate, gradients, hooked,
                                      prompt_losses, run, run_each)
from sage_nb.core.models import load_model
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.saes.fidelity import (check_saes, loss_recovered, next_token_loss, sae_inputs, splice_losses,
                                   variance_explained_by)
from sage_nb.saes.sets import load_saes
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import fit_dictionaries, one_hot, suggest_products, variance_explained
from sage_nb.truth.features import terms_of
from sage_nb.truth.runs import compare_edit, outcomes, set_up

Z, STREAM = Node("z", 3, 2, "END"), Node("resid_pre", 2)


def metric(logits, rows): return logits[:, 0]


def mean_metric(logits, rows): return logits.mean()


@pytest.fixture(scope="session")
def fixtures():
    model = load_model("tiny-gpt2")
    task = load_task("ioi", model, n=96)
    sections = find_cross_sections(model, task, attributes=["IO"], sites=["z"], max_prompts=32, verbose=False)
    truth, saes = fit_dictionaries(model, task, sections), load_saes("tiny-gpt2-res-topk")
    n, node = len(task), sections[0].nodes[0]
    acts = capture(model, task.test.prompts, [node])
    return SimpleNamespace(
        model=model, task=task, prompts=task.prompts, sections=sections, section=sections[0], truth=truth, saes=saes,
        node=node, n=n, acts=acts, x=acts[node], dictionary=truth[node], bench=set_up(model, task, sections[0], truth),
        broken=broken(model), inputs=sae_inputs(model, task.test.prompts, STREAM))


def broken(model):
    "The same model, overflowing at the values of layer 1."
    other = load_model("tiny-gpt2")
    other.blocks[1].attn.v.weight.data[:] = torch.nan
    return other


def told(tokens): return Prompts(tokens, {"END": torch.tensor([1])})


ACTIVATIONS = [
    ("a batch of none", lambda f: capture(f.model, f.prompts, [Z], batch_size=0), ValueError, "batch_size=0 is not"),
    ("a negative batch", lambda f: run(f.model, f.prompts, metric, batch_size=-4), ValueError, "batch_size=-4 is not"),
    ("half a prompt", lambda f: gradients(f.model, f.prompts, [Z], metric, 0.5), ValueError, "batch_size=0.5 is not"),
    ("no prompts", lambda f: run(f.model, f.prompts[:0], metric), ValueError, "there are no prompts"),
    ("no prompts to read", lambda f: capture(f.model, f.prompts[:0], [Z]), ValueError, "there are no prompts"),
    ("no nodes", lambda f: capture(f.model, f.prompts, []), ValueError, "there are no nodes: name at least one"),
    ("no nodes for gradients", lambda f: gradients(f.model, f.prompts, [], metric), ValueError, "there are no nodes"),
    ("a number for nodes", lambda f: capture(f.model, f.prompts, 3), TypeError, "nodes 3 (int) are not a list"),
    ("a number for a node", lambda f: capture(f.model, f.prompts, [3]), TypeError, "node 3 is neither a Node nor"),
    ("a misspelt node", lambda f: capture(f.model, f.prompts, "L3.H2.z"), ValueError, "'L3.H2.z' is not of the form"),
    ("head -1", lambda f: capture(f.model, f.prompts, [Z._replace(head=-1)]), ValueError, "head -1, and z"),
    ("a head too many", lambda f: capture(f.model, f.prompts, "L0H4.q@END"), ValueError, "has heads 0 to 3"),
    ("head -1, run", lambda f: run(f.model, f.prompts, metric, {Z._replace(head=-1): torch.zeros(f.n, 32)}),
     ValueError, "head -1, and z"),
    ("head -1, gradients", lambda f: gradients(f.model, f.prompts, [Z._replace(head=-1)], metric),
     ValueError, "head -1"),
    ("head -1, differentiate",
     lambda f: differentiate(f.model, f.prompts, metric, backward={Z._replace(head=-1): print}),
     ValueError, "head -1, and z"),
    ("layer -1", lambda f: capture(f.model, f.prompts, [Node("resid_pre", -1)]), ValueError, "it has layers 0 to 3"),
    ("a layer too many", lambda f: capture(f.model, f.prompts, "L4.resid_pre"), ValueError, "it has layers 0 to 3"),
    ("a text for a layer", lambda f: capture(f.model, f.prompts, [Node("q", "1", 0)]), ValueError, "layers 0 to 3"),
    ("a head of the stream", lambda f: capture(f.model, f.prompts, "L1H0.resid_pre"), ValueError, "names a head, and"),
    ("a site of no model", lambda f: capture(f.model, f.prompts, "L1.queries"), ValueError, "site 'queries' of node"),
    ("a position of no prompt", lambda f: capture(f.model, f.prompts, "L1H0.q@S3"), ValueError, "position 'S3' is not"),
    ("a hook of no model", lambda f: hook(f, "blocks.1.hook_nothing"), ValueError, "near it are blocks.1.hook"),
    ("a name for a model", lambda f: capture("tiny-gpt2", f.prompts, [Z]), TypeError, "'tiny-gpt2' (str) is not a Tr"),
    ("a task for prompts", lambda f: run(f.model, f.task, metric), TypeError, "give its `prompts`"),
    ("texts for prompts", lambda f: capture(f.model, f.task.texts, [Z]),
     TypeError, "those of a task are `task.prompts`"),
    ("tokens of a larger model", lambda f: run(f.model, told(torch.tensor([[1, 50000]]))),
     ValueError, "token 50000 is not"),
    ("a prompt too long", lambda f: run(f.model, told(torch.ones(1, 99, dtype=torch.long))), ValueError, "reads, 64"),
    ("tokens of one prompt", lambda f: told(torch.tensor([1, 5])), ValueError, "got a tensor of int64 of shape (2,)"),
    ("tokens in a list", lambda f: told([[1, 5]]), ValueError, "must be a tensor of token ids, prompt by pos"),
    ("a position in a list", lambda f: Prompts(f.prompts.tokens[:1], {"END": [3]}), ValueError, "got [3] (list)"),
    ("edits in a list", lambda f: run(f.model, f.prompts, metric, [Z]), TypeError, "are not a dict of values by node"),
    ("an edit of too few", lambda f: run(f.model, f.prompts, metric, {Z: torch.zeros(1, 32)}),
     ValueError, "has 1 rows for"),
    ("an edit too wide", lambda f: run(f.model, f.prompts, metric, {Z: torch.zeros(f.n, 33)}),
     ValueError, "(64, 33) where"),
    ("an edit that would spread", lambda f: run(f.model, f.prompts, metric, {Z: torch.zeros(f.n, 1)}),
     ValueError, "(64, 1)"),
    ("an edit of no width", lambda f: run(f.model, f.prompts, metric, {Z: torch.zeros(f.n)}),
     ValueError, "shape (64,)"),
    ("a number for an edit", lambda f: run(f.model, f.prompts, metric, {Z: 0.0}),
     TypeError, "is 0.0 (float), not a tensor"),
    ("a tensor of no rows", lambda f: run(f.model, f.prompts, metric, {Z: torch.tensor(0.0)}),
     ValueError, "has no rows"),
    ("an edit of a pattern", lambda f: run(f.model, f.prompts, metric, {Node("pattern", 1): torch.zeros(f.n, 9, 4, 9)}),
     ValueError, "nothing can be put there"),
    ("no edits to run each", lambda f: run_each(f.model, f.prompts, metric, {}), ValueError, "there are no nodes"),
    ("a text for a metric", lambda f: run(f.model, f.prompts, "logit"),
     TypeError, "metric 'logit' (str) is not a function"),
    ("a metric that averages", lambda f: gradients(f.model, f.prompts, [Z], mean_metric), ValueError, "one for each"),
    ("a mean from run", lambda f: run(f.model, f.prompts, mean_metric), ValueError, "a row for each"),
    ("logits for a metric", lambda f: gradients(f.model, f.prompts, [Z], lambda logits, rows: logits),
     ValueError, "one for"),
    ("passes of nothing", lambda f: count(f, 0), ValueError, "n=0 prompts cannot"),
    ("END at the start", lambda f: prompt_losses(f.model, Prompts(f.prompts.tokens[:1], {"END": torch.tensor([0])})),
     ValueError, "prompt 0 has END at its first token"),
]


def hook(f, name):
    with hooked(f.model, [(name, print)]): run(f.model, f.prompts)


def count(f, n):
    with count_passes(f.model, n): pass


TRUTH = [
    ("no sections", lambda f: fit_dictionaries(f.model, f.task, []), ValueError, "there are no nodes to fit"),
    ("a number for sections", lambda f: fit_dictionaries(f.model, f.task, 7), TypeError, "sections 7 are neither"),
    ("numbers for sections", lambda f: fit_dictionaries(f.model, f.task, [7]), TypeError, "node 7 is neither"),
    ("a name for a section", lambda f: fit_dictionaries(f.model, f.task, "IO:z@END"), ValueError, "'IO:z@END' is not"),
    ("a name for a task", lambda f: fit_dictionaries(f.model, "ioi", [Z]), TypeError, "task 'ioi' is not a Task"),
    ("a name for a model to fit", lambda f: fit_dictionaries("tiny-gpt2", f.task, [Z]),
     TypeError, "model 'tiny-gpt2'"),
    ("nothing held out", lambda f: fit_dictionaries(f.model, f.task.train, [Z]), ValueError, "no held-out prompts"),
    ("all held out", lambda f: fit_dictionaries(f.model, f.task.test, [Z]), ValueError, "no training prompts"),
    ("an unknown method", lambda f: fit_dictionaries(f.model, f.task, [Z], "median"),
     ValueError, "one of mean, weighted, mse"),
    ("a misspelt 'auto'", lambda f: fit_dictionaries(f.model, f.task, [Z], products="Auto"), ValueError, "nor 'auto'"),
    ("a flat product", lambda f: fit_dictionaries(f.model, f.task, [Z], products=("IO", "S")),
     ValueError, "product 'IO'"),
    ("a product of one", lambda f: fit_dictionaries(f.model, f.task, [Z], products=[("IO",)]),
     ValueError, "two or more"),
    ("a product of strangers", lambda f: fit_dictionaries(f.model, f.task, [Z], products=[("IO", "X")]),
     ValueError, "'X'"),
    ("a number for products", lambda f: fit_dictionaries(f.model, f.task, [Z], products=5),
     TypeError, "products 5 are not"),
    ("a number in products", lambda f: fit_dictionaries(f.model, f.task, [Z], products=[5]),
     ValueError, "product 5 is not"),
    ("a guess at the unseen", lambda f: fit_dictionaries(f.model, f.task, [Z], unseen="guess"),
     ValueError, "unseen='guess'"),
    ("a head too many to fit", lambda f: fit_dictionaries(f.model, f.task, ["L3H9.z@END"]), ValueError, "heads 0 to 3"),
    ("a batch of none to fit", lambda f: fit_dictionaries(f.model, f.task, [Z], batch_size=0),
     ValueError, "batch_size=0 is not"),
    ("activations that overflow", lambda f: fit_dictionaries(f.broken, f.task, ["L1H0.v@END"]), ValueError,
     "activations at L1H0.v@END hold nan or inf"),
    ("one fold", lambda f: suggest_products(f.model, f.task, [Z], folds=1),
     ValueError, "folds 1 must be a number from 2"),
    ("an unknown method to suggest", lambda f: suggest_products(f.model, f.task, [Z], "mes"),
     ValueError, "method 'mes'"),
    ("a node without dictionary", lambda f: f.truth["L0H0.q@IO"], ValueError, "L0H0.q@IO has no dictionary"),
    ("a number for a dictionary", lambda f: f.truth[3], TypeError, "node 3 is neither a Node nor a text"),
    ("nothing to read", lambda f: f.truth.read({}, "IO"), ValueError, "and there are none"),
    ("an unknown attribute to read", lambda f: f.truth.read(f.acts, "XX"), ValueError, "attribute 'XX' has no vectors"),
    ("a number for an attribute", lambda f: f.dictionary[3], ValueError, "attribute '3' has no vectors here (has IO"),
    ("activations of another width", lambda f: f.dictionary.read(f.x[:, :5], "IO"), ValueError, "by the 32 numbers"),
    ("an edit of strangers", lambda f: edit(f, "XX", f.task.test.attributes.IO),
     ValueError, "attribute 'XX' cannot be"),
    ("an unknown value", lambda f: edit(f, "IO", ["Nobody"] * len(f.x)),
     ValueError, "value 'Nobody' of attribute 'IO'"),
    ("too few values", lambda f: edit(f, "IO", ["Mary"]), ValueError, "and new values for 1: give one row"),
    ("one text for values", lambda f: edit(f, "IO", "Mary"), TypeError, "new values 'Mary' are one text"),
    ("an edit of one for all",
     lambda f: f.dictionary.edit(f.x[:1], "IO", f.task.test.attributes, f.task.test.attributes.IO),
     ValueError, "an edit of 1 activations has attributes for"),
    ("attributes that lack one", lambda f: f.dictionary.reconstruct(f.task.attributes[["S"]]),
     ValueError, "'IO' is missing"),
    ("a task for attributes", lambda f: f.dictionary.reconstruct(f.task), TypeError, "attributes are a Task, not"),
    ("terms of nothing", lambda f: terms_of(f.task.attributes[:0]), ValueError, "there are no prompts"),
    ("no terms", lambda f: one_hot(f.task.attributes, []), ValueError, "there are no terms"),
    ("a mean for a reconstruction", lambda f: variance_explained(f.x, f.x.mean(0), f.x.mean(0)), ValueError, "(32,)"),
    ("truth of another model", lambda f: f.truth.require(f.broken, f.task), ValueError, "a model of hash"),
    ("truth judged on its own prompts", lambda f: f.truth.require(f.model, turned(f.task)),
     ValueError, "were training"),
    ("a bench of another model", lambda f: set_up(f.broken, f.task, f.section, f.truth), ValueError, "fit them again"),
    ("a bench without held-out prompts", lambda f: set_up(f.model, f.task.train, f.section, f.truth),
     ValueError, "no held-out"),
    ("a name for a bench's section", lambda f: set_up(f.model, f.task, "IO:z@END", f.truth),
     TypeError, "not a CrossSection"),
    ("all sections for one", lambda f: set_up(f.model, f.task, f.sections, f.truth), TypeError, "not a CrossSection"),
    ("a dictionary for a truth", lambda f: set_up(f.model, f.task, f.section, f.dictionary),
     TypeError, "not a Dictionaries"),
    ("a name for a bench's task", lambda f: set_up(f.model, "ioi", f.section, f.truth), TypeError, "not a Task"),
    ("a section of another fit", lambda f: set_up(f.model, f.task, elsewhere(f.section), f.truth),
     ValueError, "no dictionary"),
    ("a clean run of others", lambda f: set_up(f.model, f.task, f.section, f.truth, clean={None: 0}),
     ValueError, "for 'IO'"),
    ("an unknown outcome", lambda f: outcomes(f.model, f.task.test, "IX"), ValueError, "attribute 'IX' is not in task"),
    ("no outcome", lambda f: outcomes(f.model, f.task.test, []), ValueError, "there are no attributes"),
    ("an edit beside others' prompts", lambda f: compare_edit(f.bench.untouched, f.bench.at(slice(0, 1)).untouched,
                                                              f.bench.target), ValueError, "cannot stand beside"),
    ("a bench's edit too wide", lambda f: f.bench.metric({f.node: torch.zeros(len(f.x), 33)}),
     ValueError, "where the model"),
]


def edit(f, attribute, new): return f.dictionary.edit(f.x, attribute, f.task.test.attributes, new)


def turned(task): return replace(task, held_out=~task.held_out)


def elsewhere(section): return replace(section, nodes=tuple(n._replace(layer=0, head=3) for n in section.nodes))


FIDELITY = [
    ("a name for SAEs", lambda f: check_saes(f.model, f.task, "tiny-gpt2-res-topk", [Z]),
     TypeError, "load_saes makes one"),
    ("a list of SAEs", lambda f: check_saes(f.model, f.task, [*f.saes], [Z]), TypeError, "are not an SAESet"),
    ("a name for a checked task", lambda f: check_saes(f.model, "ioi", f.saes, [Z]), TypeError, "'ioi' is not a Task"),
    ("a name for a checked model", lambda f: check_saes("tiny-gpt2", f.task, f.saes, [Z]), TypeError, "not a Transf"),
    ("no nodes to check", lambda f: check_saes(f.model, f.task, f.saes, []), ValueError, "there are no nodes"),
    ("an unknown route", lambda f: check_saes(f.model, f.task, f.saes, [Z], "both"), ValueError, "one of read, write"),
    ("a node too high", lambda f: check_saes(f.model, f.task, f.saes, ["L9H0.q@END"]), ValueError, "before layer 9"),
    ("a check of no prompts", lambda f: check_saes(f.model, f.task, f.saes, [Z], max_prompts=0),
     ValueError, "max_prompts 0"),
    ("a check of fewer", lambda f: check_saes(f.model, f.task, f.saes, [Z], max_prompts=-3),
     ValueError, "max_prompts -3"),
    ("a check on training prompts", lambda f: check_saes(f.model, f.task.train, f.saes, [Z]),
     ValueError, "no held-out"),
    ("a loss of one position", lambda f: next_token_loss(f.model, f.prompts, "L2.resid_pre@END", torch.zeros_like),
     ValueError, "must be of all heads and all tokens"),
    ("a loss of one head", lambda f: next_token_loss(f.model, f.prompts, "L2H0.z", torch.zeros_like),
     ValueError, "all heads"),
    ("a place without a change", lambda f: next_token_loss(f.model, f.prompts, STREAM), ValueError, "given together"),
    ("a change of another shape", lambda f: next_token_loss(f.model, f.prompts, STREAM, torch.mean),
     ValueError, "gave ()"),
    ("a loss of a layer too high", lambda f: next_token_loss(f.model, f.prompts, "L9.resid_pre", torch.zeros_like),
     ValueError, "it has layers 0 to 3"),
    ("an ablation of another width",
     lambda f: loss_recovered(f.model, f.prompts, STREAM, f.saes.before(2), torch.zeros(3)),
     ValueError, "ablation (3,) must be"),
    ("an SAE of another width",
     lambda f: splice_losses(f.model, f.prompts, STREAM, narrow(f.saes.before(2)), torch.zeros(64)),
     ValueError, "ablation (64,) must be"),
    ("an SAE of another model",
     lambda f: next_token_loss(f.model, f.prompts, STREAM, narrow(f.saes.before(2)).reconstruct),
     ValueError, "takes activations of width 64, got 128"),
    ("activations of nobody", lambda f: variance_explained_by(f.saes.before(2), f.inputs[:0]),
     ValueError, "(0, 128) must be"),
    ("one activation", lambda f: variance_explained_by(f.saes.before(2), f.inputs[0]),
     ValueError, "(128,) must be some"),
    ("activations of another SAE", lambda f: variance_explained_by(f.saes.before(2), f.inputs[:, :9]),
     ValueError, "width 128"),
    ("inputs of no place", lambda f: sae_inputs(f.model, f.prompts, "L2.resid"), ValueError, "site 'resid' of node"),
]


def narrow(sae): return replace(sae, W_dec=sae.W_dec[:, :64], b_dec=sae.b_dec[:64])


ROWS = ACTIVATIONS + TRUTH + FIDELITY  # (what, call, error, part of its text)


@pytest.mark.parametrize("what,call,error,text", ROWS, ids=[row[0] for row in ROWS])
def test_wrong_calls_are_refused(what, call, error, text, fixtures):
    with pytest.raises(error) as caught: call(fixtures)
    assert text in str(caught.value), str(caught.value)
    assert type(caught.value) is error


def test_what_is_not_wrong_is_taken(fixtures):
    f = fixtures
    short = str(f.node)
    assert f.truth[short] is f.truth[f.node]
    assert torch.equal(capture(f.model, f.task.test.prompts, short)[f.node], f.x)
    assert f.truth.read({short: f.x}, "IO") == f.truth.read(f.acts, "IO")
    for sections in (f.section, f.node, short, [short], [f.section, f.node]):
        assert f.node in fit_dictionaries(f.model, f.task, sections).nodes
    assert torch.equal(run(f.model, f.task.test.prompts, metric, {short: f.x}),
                       run(f.model, f.task.test.prompts, metric, {f.node: f.x}))
    assert check_saes(f.model, f.task, f.saes, short, max_prompts=8).verdict.tolist() == ["good"]
    assert list(outcomes(f.model, f.task.test, "IO")) == ["IO"]
    assert pd.notna(next_token_loss(f.model, f.prompts[:4], "L2.resid_pre", torch.zeros_like))
