"""What a report says of itself in words: golden sentences, each of a made-up report in which only that is wrong."""
from dataclasses import replace
from types import SimpleNamespace

import made_up
import pandas as pd
import pytest

from sage_nb.report.reasons import explanations, verdict_of, warnings_of
from sage_nb.saes.baselines import twin_name

X, TWIN = "an SAE", twin_name("an SAE")


@pytest.fixture(scope="module")
def whole():
    "A report about which there is nothing to say but that one test was made."
    made = made_up.report(explorers=False)
    return replace(made, settings=made.settings | {"tests": [1, 2, 3]})


def sections(whole, **columns): return replace(whole, sections=whole.sections.assign(**columns))
def settings(whole, **changed): return replace(whole, settings=whole.settings | changed)


def without_truth(whole, label="mse"):
    weak = (whole.table.metric == "R²") & (whole.table.section == "IO:v@IO")
    table = whole.table.assign(value=whole.table.value.mask(weak, 0.4))
    return replace(settings(whole, dictionaries={"label": label}), table=table)


def unwell(whole):
    said = SimpleNamespace(of=lambda verdict: [SimpleNamespace(name="causal")] if verdict == "doubtful" else [])
    parts = {name: getattr(whole, name) for name in ("scores", "sections", "table", "fit", "settings", "evidence",
        "values")}
    return SimpleNamespace(**parts, parts=whole.parts, diagnosis=said)


def above(whole):
    kept = [replace(e, planted=e.own, own=e.planted) for e in whole.evidence[X]]
    return replace(whole, evidence=whole.evidence | {X: kept[:1], TWIN: whole.evidence[TWIN][:1]})


def as_its_twin(whole): return replace(whole, evidence=whole.evidence | {X: whole.evidence[TWIN]})


def without_twin(whole):
    return replace(whole, scores=whole.scores[whole.scores.sae != TWIN])


def fit(whole, **columns): return replace(whole, fit=whole.fit.assign(**columns))


def wide(whole):
    mine = whole.scores.sae == X
    return replace(whole, scores=whole.scores.assign(hi=whole.scores.hi.mask(mine, 0.95)))


SAID = {
    "few sections": (lambda r: sections(r, counts=[True, False, False]),
                     "Only 1 of 3 cross-sections counts: the score speaks of this one and not of the whole task."),
    "a partial report": (lambda r: settings(r, partial="2 of 6 cross-sections"),
                         "The report is partial: 2 of 6 cross-sections were tried."),
    "weak ground truth": (without_truth, "The ground truth is weak at IO:v@IO (R² 0.40), and scores are shares of "
    "what it "
                          'reaches: try products, fit_dictionaries(..., products="auto").'),
    "weak with products": (lambda r: without_truth(r, "mse + IO×Pos"), "The ground truth is weak at IO:v@IO (R² "
    "0.40), and "
                           "scores are shares of what it reaches: fit it on more prompts."),
    "a baseline solves it": (lambda r: sections(r, **{"baseline score": [0.8, 0.1, 0.9]}),
                             "IO:z@END is solved without features too: identity reaches 0.80 of the ground truth "
                             "there, so "
                             "a high score says little."),
    "above the skyline": (above, "an SAE does more than the ground truth at IO:z@END (faithfulness 1.43 times): the "
    "ground "
                          "truth is not the best there can be, and the score, cut at 1, does not show it."),
    "low variance explained": (lambda r: fit(r, **{"variance explained": 0.55}), "an SAE at L0.resid_pre explains "
    "only 0.55 "
                               "of the variance: what it leaves out no latent can have."),
    "doubtful fit": (lambda r: fit(r, verdict="doubtful", cause="recovers 0.30 of the loss"),
                     "an SAE at L0.resid_pre is doubtful: recovers 0.30 of the loss."),
    "forced": (lambda r: fit(r, verdict="refused, forced", cause="it is of another layer"),
               "an SAE at L0.resid_pre is refused, forced: it is of another layer."),
    "no better than chance": (as_its_twin, "an SAE is not above its random twin (difference 0.00 [0.00, 0.00]): "
    "training "
                              "gave it nothing here."),
    "no twin": (without_twin, "No random twin of an SAE was tried: what chance would reach is not known."),
    "repeated prompts": (lambda r: settings(r, task={"name": "ioi", "held out": 64, "distinct held out": 23}),
                         "Only 23 distinct prompts among 64 held out: repeats make intervals too narrow."),
    "few prompts": (lambda r: settings(r, task={"name": "ioi", "held out": 24}),
                    "Only 24 held-out prompts: intervals are wide, and rare values hardly occur."),
    "a wide interval": (wide, "The interval of an SAE is 0.27 wide: more prompts would narrow it."),
    "one path": (lambda r: sections(r, **{"same path as": ["IO:v@IO", "IO:z@END", ""]}),
                 "IO:v@IO and IO:z@END: stages of one path each, so hardly independent findings."),
    "tokens that say it": (lambda r: sections(r, lexical=[False, True, True]), "At IO:v@IO the token says the value: a "
                           "latent of the token is one of the attribute there, whether or not the model uses it."),
    "tests left out": (lambda r: settings(r, tests=[1, 3]), "The score lacks control: it is not comparable with a "
    "full one."),
    "the doctor": (unwell, "The doctor is not content with the model: causal. See the checks below."),
}


@pytest.mark.parametrize("what", SAID)
def test_a_warning_is_given_where_it_is_due_and_alone(whole, what):
    change, said = SAID[what]
    assert warnings_of(change(whole)) == [said]
    assert said not in warnings_of(whole)


def test_nothing_is_warned_of_where_nothing_is_the_matter(whole): assert warnings_of(whole) == []


def test_the_verdict(whole):
    assert verdict_of(whole) == [
        "an SAE scores 0.70 [0.68, 0.72] on 2 of 3 cross-sections of ioi, judged on 64 held-out prompts. Its random "
        "twin "
        "scores 0.10, the best of what else knows no feature (identity) 0.10 and the ground truth itself 1.00.",
        "an SAE is weakest at IO:z@END (0.70): faithful (0.70). Of 3 values 1 has a latent of its own, 1 is split into "
        "several (Tom into 2) and 1 is merged with another (Jane with Anna)."]


def test_the_verdict_on_several_sets():
    lines = verdict_of(made_up.report(["good", "fair", "poor"], explorers=False))
    assert [line.split()[0] for line in lines] == ["good", "good", "fair", "fair", "poor", "poor", "good", "fair"]
    assert lines[-2].startswith("good scores higher than fair (difference 0.10 [")
    many = verdict_of(made_up.report([f"SAE {i}" for i in range(7)], explorers=False))
    assert many[-1] == "2 more sets score lower; the scorecard has all of them." and len(many) == 11


@pytest.mark.parametrize("parts,reasons,what,values", [
    ((0.9, 0.9, 0.9), ["own latent"] * 3, "Close to the ground truth: faithful (0.90), controllable (0.90) and covered "
     "(0.90)", "Of 3 values 3 have a latent of their own"),
    ((0.9, 0.2, 0.8), ["fires, carries little"] * 3, "Faithful (0.90) and covered (0.80), but exchanging the named "
            "latents "
     "does not turn the model as the values do (control 0.20)",
     "Of 3 values 3 have a latent that fires but carries little"),
    ((0.2, 0.1, 0.0), ["no latent"] * 3, "Few latents do not do what the activation does (faithfulness 0.20), "
            "exchanging the "
     "named latents does not turn the model as the values do (control 0.10); and most values have no latent of "
     "their own "
     "(coverage 0.00)", "Not found: no latent says any of the 3 values"),
    ((0.9, 0.6, 0.3), ["absorbed", "absorbed", "weak"], "Faithful (0.90) and controllable (0.60), but most values "
            "have no "
     "latent of their own (coverage 0.30)", "Of 3 values 2 are absorbed (a, b) and 1 is said weakly")])
def test_why_a_score_is_low(whole, parts, reasons, what, values):
    index = pd.MultiIndex.from_tuples([(X, "IO:z@END")], names=["sae", "section"])
    table = pd.DataFrame([(0.5, *parts)], index, ["score", "faithfulness", "control", "coverage"])
    frame = pd.DataFrame({"set": X, "section": "IO:z@END", "value": list("abc"), "reason": reasons})
    made = SimpleNamespace(settings=whole.settings, scores=whole.scores, evidence={}, values=frame, table=whole.table,
                           parts=lambda: table)
    row, = explanations(made).to_dict("records")
    assert (row["what"], row["values"]) == (what, values)
