"""Wrong calls of intervals, activity, interpretability, the score and its validation: each is refused, and says why."""
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sage_nb.core.activations import Node
from sage_nb.core.intervals import interval, intervals, n_prompts, resample_counts
from sage_nb.core.models import load_model
from sage_nb.measures.activity import Activity, ActivityBuilder, activity
from sage_nb.measures.faithfulness import SPARSE_KS, SparseRuns
from sage_nb.measures.interpretability import Condition, interpret
from sage_nb.measures.named import NAMED_KS, NamedEdits
from sage_nb.measures.score import Answers, Evidence, compare, margin, sage_score, score_parts
from sage_nb.report.validation import coverage_of_sets, interval_coverage, ladder, validate_score
from sage_nb.saes.sets import load_saes
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import fit_dictionaries

NODE = "L1H0.v@IO"


class Pair(NamedTuple):
    "Two numbers of each prompt."
    left: torch.Tensor
    right: torch.Tensor


def few(n=8):
    "What few latents do: evidence on faithfulness."
    g, k = torch.Generator().manual_seed(n), len(SPARSE_KS)
    clean, ablated = (torch.randn(n, generator=g) + shift for shift in (4, 0))
    return Answers(SparseRuns(clean, ablated, 3 + torch.randn(n, k, generator=g), torch.randn(n, k, generator=g)))


def edited(n=8):
    "The same, and edits by name."
    ones = torch.ones(n, len(NAMED_KS))
    return few(n)._replace(named=NamedEdits(ones, ones, ones, *[ones[:, :1]] * 3))


def on_few(section="IO:v@IO", n=8, **options): return Evidence(section, few(n), few(n), **options)


def on_both(**options): return Evidence("IO:v@IO", edited(), edited(), **options)


@pytest.fixture(scope="session")
def fixtures():
    model = load_model("tiny-gpt2")
    task, saes = load_task("ioi", model, n=96), load_saes("tiny-gpt2-res-topk")
    active = activity(model, task.prompts, [NODE, "L3H2.v@IO"], saes)
    return SimpleNamespace(
        model=model, task=task, saes=saes, active=active, names=interpret(active, task.attributes, task.held_out),
        truth=fit_dictionaries(model, task, [Node.parse(NODE)]),
        evidence=[on_few()], other=[on_few("S:v@S2")])


def with_nan(n=8):
    x = torch.ones(n)
    x[3] = torch.nan
    return x


ROWS = [  # (what, call, error, part of its text)
    ("no evidence", lambda f: interval([]), ValueError, "there is no evidence"),
    ("evidence that is None", lambda f: interval(None), ValueError, "there is no evidence"),
    ("one prompt", lambda f: interval(torch.ones(1)), ValueError, "at least 2 prompts, got 1: evaluate more"),
    ("no prompt", lambda f: interval(torch.ones(0)), ValueError, "at least 2 prompts, got 0"),
    ("a single number", lambda f: interval(torch.tensor(1.0)), ValueError, "has no prompt axis"),
    ("a list of numbers", lambda f: interval([1.0, 2.0]), TypeError, "[0] is of type float: evidence is a tensor"),
    ("an array", lambda f: interval(np.ones(3)), TypeError, "of type ndarray"),
    ("a text", lambda f: interval("IO"), TypeError, "evidence is of type str"),
    ("nan in one tensor", lambda f: interval(Pair(torch.ones(8), with_nan()), lambda m: m.left), ValueError,
     "right holds nan or inf in 1 of 8 prompts, the first is prompt 3"),
    ("nan deep inside", lambda f: sage_score([replace(f.evidence[0], planted=Answers(
        few().sparse._replace(ablated=with_nan())))]), ValueError, "ablated holds nan or inf"),
    ("inf", lambda f: n_prompts(torch.tensor([1.0, torch.inf])), ValueError, "the first is prompt 1"),
    ("evidence of different lengths", lambda f: interval(Pair(torch.ones(4), torch.ones(3)), lambda m: m.left),
     ValueError, "left of 4, right of 3"),
    ("a score of several numbers", lambda f: interval(torch.ones(4, 3)), ValueError,
     "3 numbers, an interval is of one"),
    ("a score of no number", lambda f: interval(torch.ones(4, 0)), ValueError, "the score gives 0 numbers"),
    ("a score that sums over resamples", lambda f: interval(torch.ones(4), lambda m: m.sum()), ValueError,
     "must leave the first axis alone"),
    ("a score that is no tensor", lambda f: interval(torch.ones(4), lambda m: 1.0), ValueError,
     "score 'score' gives float"),
    ("scores without names", lambda f: intervals(torch.ones(4), lambda m: m), TypeError, "not a dict of functions"),
    ("no resamples", lambda f: interval(torch.ones(4), n_resamples=0), ValueError, "n_resamples=0"),
    ("fewer than no resamples", lambda f: resample_counts(4, -2), ValueError, "n_resamples=-2"),
    ("counts of no prompts", lambda f: resample_counts(0), ValueError, "n=0 prompts to draw from"),
    ("a single node", lambda f: activity(f.model, f.task.prompts, NODE, f.saes), TypeError, "put it in a list"),
    ("no nodes", lambda f: activity(f.model, f.task.prompts, [], f.saes), ValueError, "there are no nodes"),
    ("a node that is no node", lambda f: activity(f.model, f.task.prompts, ["IO"], f.saes), ValueError, "'IO'"),
    ("a share of 80", lambda f: activity(f.model, f.task.prompts, [NODE], f.saes, 80), ValueError, "min_share=80"),
    ("a negative share", lambda f: ActivityBuilder(-0.1), ValueError, "min_share=-0.1 is no share"),
    ("entries of prompts that are not there", lambda f: Activity.of_entries(
        np.array([5]), np.array([0]), np.array([1]), (Node("resid_pre", 1),), 3), ValueError,
     "an entry is of prompt 5"),
    ("an unknown attribute in a condition", lambda f: Condition("Place", ("x",)).holds(f.task.attributes), ValueError,
     "'Place' is not one of IO, S, Pos"),
    ("coverage of an unknown attribute", lambda f: f.names.coverage(attribute="Place"), ValueError, "'Place'"),
    ("coverage in percent", lambda f: f.names.coverage(50), ValueError, "threshold=50 is no F1"),
    ("a negative threshold", lambda f: f.names.counts(-0.5), ValueError, "threshold=-0.5"),
    ("a threshold that is nan", lambda f: f.names.counts(float("nan")), ValueError, "threshold=nan"),
    ("attributes that are no table", lambda f: interpret(f.active, [1, 2]), TypeError, "take `task.attributes`"),
    ("attributes of other prompts", lambda f: interpret(f.active, f.task.attributes[:5]), ValueError,
     "attributes of 5"),
    ("no attributes", lambda f: interpret(f.active, f.task.attributes[[]]), ValueError, "have no column"),
    ("attributes with gaps", lambda f: interpret(f.active, f.task.attributes.assign(S=None)), ValueError,
     "'S' lacks a value"),
    ("scoring of other prompts", lambda f: interpret(f.active, f.task.attributes, f.task.held_out[:7]), ValueError,
     "scoring of 7"),
    ("nothing to find on", lambda f: interpret(f.active, f.task.attributes, np.ones(96)), ValueError,
     "96 are to score on"),
    ("unions of no values", lambda f: interpret(f.active, f.task.attributes, most=0), ValueError, "most=0"),
    ("no sections to score", lambda f: sage_score([]), ValueError, "evidence is empty"),
    ("one section without a list", lambda f: sage_score(f.evidence[0]), TypeError, "put it in a list"),
    ("the name of an SAE", lambda f: sage_score("tiny-gpt2-res-topk"), TypeError, "not a list of `Evidence`"),
    ("means of another number of sections", lambda f: score_parts(f.evidence, []), ValueError,
     "means of 0 sections for 1"),
    ("an unknown measure", lambda f: on_both(measure="sucess"), ValueError,
     "measure 'sucess' of IO:v@IO is not one of success, effect"),
    ("control that is seen by nothing", lambda f: on_both(), ValueError, "measure None of IO:v@IO"),
    ("a measure of what was not asked", lambda f: on_few(measure="effect"), ValueError, "'effect' of IO:v@IO is not"),
    ("no answers", lambda f: Evidence("a", Answers(), Answers()), ValueError, "ask the same of both, and something"),
    ("a planted dictionary that was asked less", lambda f: Evidence("a", edited(), few(), measure="effect"), ValueError,
     "ask the same of both"),
    ("a weight in per cent", lambda f: on_few(weight=50), ValueError, "weight=50 of IO:v@IO is not in [0, 1]"),
    ("a negative weight", lambda f: on_few(weight=-0.1), ValueError, "weight=-0.1"),
    ("a weight that is nan", lambda f: on_few(weight=float("nan")), ValueError, "weight=nan"),
    ("a planted dictionary on other prompts", lambda f: sage_score([Evidence("a", few(8), few(9))]), ValueError,
     "evidence must be of one set of prompts"),
    ("no baseline", lambda f: margin(f.evidence, {}), ValueError, "there is no baseline to stand above"),
    ("rows that are not there", lambda f: f.evidence[0].at(torch.tensor([8])), ValueError, "not among 8 prompts"),
    ("a mask of other prompts", lambda f: f.evidence[0].at(torch.ones(3).bool()), ValueError, "a mask of shape (3,)"),
    ("rows with a fraction", lambda f: f.evidence[0].at(torch.ones(3)), ValueError, "numbers with a fraction"),
    ("comparing nothing", lambda f: compare([], f.evidence), ValueError, "the evidence on a is empty"),
    ("comparing other sections", lambda f: compare(f.evidence, f.other), ValueError, "in IO:v@IO and in S:v@S2"),
    ("comparing other tests", lambda f: compare(f.evidence, [on_both(measure="success")]), ValueError,
     "with the same `tests`"),
    ("comparing what is seen otherwise", lambda f: compare([on_both(measure="success")], [on_both(measure="effect")]),
     ValueError, "with the same `tests`"),
    ("comparing other weights", lambda f: compare(f.evidence, [on_few(weight=0.5)]), ValueError,
     "do not weigh the same"),
    ("comparing other prompts", lambda f: compare(f.evidence, [on_few(n=9)]), ValueError, "on 8 prompts, b on 9"),
    ("a misspelt ladder", lambda f: ladder(f.truth, [NODE], "nois"), ValueError, "ladder 'nois' is not one of noise"),
    ("a rung in percent", lambda f: ladder(f.truth, [NODE], "noise", [0, 50]), ValueError, "rung 50 is no share"),
    ("a negative rung", lambda f: ladder(f.truth, [NODE], "noise", [-0.5]), ValueError, "rung -0.5"),
    ("a rung that is nan", lambda f: ladder(f.truth, [NODE], "noise", [float("nan")]), ValueError, "rung nan"),
    ("no rungs", lambda f: ladder(f.truth, [NODE], "noise", []), ValueError, "rungs is empty"),
    ("a ladder of no nodes", lambda f: ladder(f.truth, [], "noise"), ValueError, "there are no nodes"),
    ("one rung to rank", lambda f: validate_score(f.model, f.task, [], f.truth, rungs=[0.5]), ValueError,
     "cannot be ranked"),
    ("one ladder without a list", lambda f: validate_score(f.model, f.task, [], f.truth, "noise"), TypeError,
     "ladders='noise' is a single ladder"),
    ("no repeats", lambda f: interval_coverage(f.evidence, repeats=0), ValueError, "repeats=0"),
    ("samples of one prompt", lambda f: interval_coverage(f.evidence, n=1), ValueError, "n=1 prompts make no sample"),
    ("coverage of nothing", lambda f: interval_coverage([]), ValueError, "evidence is empty"),
    ("coverage of no SAE", lambda f: coverage_of_sets({}, ["a"]), ValueError, "there is nothing to count"),
    ("texts of other prompts", lambda f: coverage_of_sets({"a": f.evidence}, ["a"]), ValueError,
     "the evidence on a is of 8 prompts, texts are 1"),
]


@pytest.mark.parametrize("what,call,error,text", ROWS, ids=[row[0] for row in ROWS])
def test_wrong_calls_are_refused(what, call, error, text, fixtures):
    with pytest.raises(error) as caught: call(fixtures)
    assert text in str(caught.value)
