"""The doctor: each planted fault is found by the check that names it, and sound models pass."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from families import make
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookPoint

from sage_nb.core.activations import Node, count_passes
from sage_nb.core.doctor import EXPERIMENTS, Check, Diagnosis, doctor, examined
from sage_nb.core.models import EMBEDDED, load_model
from sage_nb.discovery import sections as discovery
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.lab.cli import main
from sage_nb.report import evaluation
from sage_nb.report.report import SageReport
from sage_nb.tasks.planted import planted_circuit

ZOO = ("tiny-gpt2", "tiny-pythia", "tiny-gemma")


def hooked_model(**options):
    "A random HookedTransformer of two layers, whose heads share keys and values."
    cfg = dict(n_layers=2, d_model=16, n_ctx=16, d_head=4, n_heads=4, n_key_value_heads=2, d_vocab=40, act_fn="gelu",
               normalization_type="RMS", seed=0, default_prepend_bos=False)
    return HookedTransformer(HookedTransformerConfig(**cfg | options)).eval().requires_grad_(False)


def verdicts(diagnosis): return {check.name: check.verdict for check in diagnosis.checks}


# Models that are well

@pytest.mark.parametrize("name", ZOO)
def test_embedded_models_are_well(name):
    diagnosis = doctor(load_model(name))
    assert set(verdicts(diagnosis).values()) == {"ok"}, diagnosis
    assert len(str(diagnosis).splitlines()) <= 30 and max(map(len, str(diagnosis).splitlines())) <= 120
    assert diagnosis.ok and len(diagnosis.table) == len(diagnosis.checks)
    absent = name == "tiny-pythia"
    assert ("resid_mid absent, as in all models of this kind" in str(diagnosis)) == absent


def test_every_family_is_well_in_both_classes(random_model):
    diagnosis = doctor(random_model)
    assert not diagnosis.of("failed") and not diagnosis.of("doubtful"), diagnosis
    compared = verdicts(diagnosis)["transformers"]
    assert compared == ("ok" if hasattr(random_model, "original_model") else "not applicable")


def test_a_hand_written_transformer_and_one_without_a_tokenizer_are_well():
    written = [planted_circuit().model, planted_circuit(6, leak=0.0).model]
    for model in (*written, hooked_model(), hooked_model(attn_only=True), hooked_model(n_ctx=3),
                  hooked_model(normalization_type=None), hooked_model(parallel_attn_mlp=True)):
        diagnosis = doctor(model)
        assert set(verdicts(diagnosis).values()) <= {"ok", "not applicable"}, diagnosis
    assert verdicts(diagnosis)["tokenizer"] == verdicts(diagnosis)["bos"] == "not applicable"


def test_folded_weights_are_not_compared_with_transformers():
    model = load_model("tiny-gpt2")
    model.enable_compatibility_mode()
    diagnosis = doctor(model)
    assert verdicts(diagnosis)["transformers"] == "not applicable" and not diagnosis.of("failed"), diagnosis


# Faults, each in a real model

class Deaf(HookPoint):
    "Calls its hooks and goes on with what was there."
    def __call__(self, x):
        super().__call__(x)
        return x


class Loud(HookPoint):
    "Goes on with twice what is put in."
    def __call__(self, x):
        y = super().__call__(x)
        return x if y is x else 2 * y


class HalfDeaf(HookPoint):
    "Goes on with half of an edit."
    def __call__(self, x): return (x + super().__call__(x)) / 2


class WithResidual(HookPoint):
    "Shows its hooks what attention writes with the residual stream inside; `stream` is that of the run."
    def __call__(self, x): return super().__call__(x + self.stream) - self.stream


def at(model, place, kind=None, change=None):
    "The model, with a hook point of another kind, or one whose output is changed beforehand."
    point = model.hook_dict[Node.parse(place).hook]
    if kind: point.__class__ = kind
    if change: point.register_forward_hook(lambda module, args, x: change(x))
    return model


def hook_renamed():
    model = hooked_model()
    model.hook_dict["blocks.1.attn.hook_query"] = model.hook_dict.pop("blocks.1.attn.hook_q")
    return model


def hook_orphaned():
    model = hooked_model()
    model.blocks[1].attn.hook_z = torch.nn.Identity()  # hook_dict keeps the old one
    return model


def queries_scaled_in_the_split_copy():
    model = load_model("tiny-pythia")
    model.blocks[2].attn.q.original_component.weight.mul_(1.1)
    return model


def norm_dropped():
    model = load_model("tiny-gpt2")
    norm = model.blocks[1].ln1
    vars(norm)["forward"] = lambda x: x * norm.weight + norm.bias
    return model


def norm_added():
    model = hooked_model()
    model.blocks[0].attn.register_forward_hook(lambda module, args, x: x / x.norm(dim=-1, keepdim=True))
    return model


def residual_inside():
    model = at(hooked_model(), "L1.attn_out", WithResidual)
    point = model.blocks[1].hook_attn_out
    model.blocks[1].hook_resid_pre.register_forward_hook(lambda module, args, x: vars(point).update(stream=x))
    return model


def wrong_kv_map():
    model = hooked_model()
    attn, mixed, scored = model.blocks[1].attn, *(getattr(model.blocks[1].attn, f"calculate_{what}") for what in (
        "z_scores", "attention_scores"))
    attn.calculate_z_scores = lambda v, pattern: mixed(v.flip(2), pattern)
    attn.calculate_attention_scores = lambda q, k: scored(q, k.flip(2))
    return model


def without_bos():
    model = planted_circuit().model
    model.cfg.default_prepend_bos = False
    return model


def without_bos_where_the_tokenizer_has_one():
    model = load_model("tiny-gpt2")
    model.cfg.default_prepend_bos = False
    return model


def no_bos_token():
    model = load_model("tiny-gpt2")
    model.tokenizer.bos_token = None
    return model


def overflow():
    model = load_model("tiny-gpt2", dtype=torch.float16)
    model.blocks[1].mlp.out.original_component.weight.mul_(3e4)
    return model


def tokens_too_many():
    model = load_model("tiny-gpt2")
    model.tokenizer.add_tokens(["Timbuktu"])
    return model


def left_padding():
    "Right-padded rows are moved to the right before they are read, and back afterwards."
    model = hooked_model()
    forward = model.forward

    def moved(tokens, *args, **kwargs):
        pads = [int((row != 0).nonzero().max()) + 1 - len(row) for row in tokens]
        rows = torch.stack([row.roll(-pad) for row, pad in zip(tokens, pads)])
        logits = forward(rows, *args, **kwargs)
        return torch.stack([row.roll(pad, 0) for row, pad in zip(logits, pads)])
    model.forward = moved
    return model


def centred_over_tokens():
    model = hooked_model()
    model.unembed.register_forward_hook(lambda module, args, logits: logits - logits.mean(1, keepdim=True))
    return model


FAULTS = {  # what is wrong -> the model, the check that must say so, and the site that it must name, if any
    "a hook renamed": (hook_renamed, "hooks fire", "q"),
    "a hook that is never called": (hook_orphaned, "hooks fire", "z"),
    "a hook that nobody reads": (lambda: at(hooked_model(), "L1.k", Deaf), "edits tell", "k"),
    "the same in a bridge": (lambda: at(load_model("tiny-gpt2"), "L2.z", Deaf), "edits tell", "z"),
    "an edit that counts twice": (lambda: at(hooked_model(), "L0.v", Loud), "own activations", "v"),
    "an edit that reaches half": (lambda: at(hooked_model(), "L0.mlp_out", HalfDeaf), "edits add up", "mlp_out"),
    "queries scaled": (lambda: at(hooked_model(), "L1.q", change=lambda q: 1.01 * q), "q", "q"),
    "queries scaled in a bridge": (queries_scaled_in_the_split_copy, "transformers", None),
    "one head of keys scaled": (
        lambda: at(load_model("tiny-gemma"), "L3.k", change=lambda k: torch.cat([k[..., :32], 1.01 * k[..., 32:]], -1)),
        "k", "k"),
    "a norm dropped": (norm_dropped, "transformers", None),
    "a norm behind attention": (norm_added, "attn_out", "attn_out"),
    "values of the wrong heads": (wrong_kv_map, "z", "z"),
    "keys of the wrong heads": (wrong_kv_map, "pattern", "pattern"),
    "a shifted pattern": (
        lambda: at(load_model("tiny-pythia"), "L1.pattern", change=lambda p: p.roll(1, -1)), "pattern", "pattern"),
    "the residual inside attn_out": (residual_inside, "stream", "resid_mid"),
    "the residual inside attn_out, by the weights": (residual_inside, "attn_out", "attn_out"),
    "BOS missing": (without_bos, "bos", None),
    "no BOS in the tokenizer": (no_bos_token, "bos", None),
    "more tokens than the model has": (tokens_too_many, "tokenizer", None),
    "float16 overflows": (overflow, "numbers", None),
    "noise": (lambda: at(hooked_model(), "L0.mlp_out", change=lambda x: x + 0.1 * torch.randn_like(x)),
              "repeatable", None),
    "centred over the batch": (lambda: at(hooked_model(), "L0.mlp_out", change=lambda x: x - x.mean(0)),
                               "batch size", None),
    "left padding": (left_padding, "right padding", None),
    "logits that know each other": (centred_over_tokens, "read at END", None),
    "looks ahead": (lambda: hooked_model(attention_dir="bidirectional"), "causal", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_the_check_that_names_it(fault):
    make, name, site = FAULTS[fault]
    diagnosis = doctor(make())
    check, = [check for check in diagnosis.checks if check.name == name]
    assert check.verdict == "failed" and check.remedy, diagnosis
    assert not (check.measured is not None and check.limit is not None and name != "edits tell"
                and check.measured <= check.limit)
    assert site is None or site in check.sites and site in check.found, check
    assert not diagnosis.ok and name in diagnosis.line.partition("failed: ")[2]
    assert len(str(diagnosis).splitlines()) <= 30
    with pytest.raises(ValueError) as refused: diagnosis.require([name])
    assert check.remedy in str(refused.value) and check.figures in str(refused.value)


def test_only_the_layer_that_is_wrong_is_named():
    diagnosis = doctor(at(hooked_model(n_layers=3), "L1.q", change=lambda q: 1.01 * q))
    found = {check.name: check.found for check in diagnosis.of("failed")}
    assert found == {"q": "at q of layer 1"}


def test_a_model_that_may_lack_bos_is_doubtful():
    diagnosis = doctor(without_bos_where_the_tokenizer_has_one())
    assert [check.name for check in diagnosis.of("doubtful")] == ["bos"] and diagnosis.ok


def test_half_precision_is_doubtful():
    diagnosis = doctor(load_model("tiny-gpt2", dtype=torch.bfloat16))
    assert [check.name for check in diagnosis.of("doubtful")] == ["numbers"] and diagnosis.ok, diagnosis


# What it must not do

def state_of(model):
    hooks = [[*map(len, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, getattr(m, "fwd_hooks", [])))]
             for m in model.modules()]
    side = model.tokenizer and model.tokenizer.padding_side
    return hooks, [x.clone() for x in (*model.parameters(), *model.buffers())], side, dict(vars(model.cfg))


@pytest.mark.parametrize("make", [lambda: load_model("tiny-gemma"), hooked_model, hook_orphaned, residual_inside])
def test_the_model_is_left_as_it_was(make):
    model = make()
    model(torch.ones(1, 2, dtype=torch.int))  # at the first run, transformers puts hooks of its own in
    before, after = state_of(model), (doctor(model), state_of(model))[1]
    assert before[0] == after[0] and before[2] == after[2] and before[3].keys() == after[3].keys()
    assert all(torch.equal(x, y) for x, y in zip(before[1], after[1]))
    assert all("forward" not in vars(block) for block in model.blocks)


def test_a_check_that_raises_has_failed_and_the_others_are_made(monkeypatch):
    model = hooked_model()
    monkeypatch.setattr("sage_nb.core.doctor.run_each", lambda *args: [][0])
    diagnosis = doctor(model)
    assert [check.name for check in diagnosis.of("failed")][:3] == ["own activations", "edits tell", "edits add up"]
    assert "IndexError: list index out of range" in diagnosis.of("failed")[0].found
    assert len(diagnosis.of("ok")) > 10


def test_a_model_that_cannot_be_run_fails_every_check():
    model = hooked_model()
    model.forward = lambda *args, **kwargs: 1 / 0
    assert {"ok"} & set(verdicts(doctor(model)).values()) == set()


@pytest.mark.parametrize("family", ["opt", "qwen-3"])
def test_other_families_are_examined(family):
    judged = verdicts(doctor(make(family).bridge))
    judged.pop("bos")
    assert set(judged.values()) == {"ok"}


def test_a_large_model_is_looked_at_in_some_layers():
    model = hooked_model(n_layers=12, d_model=8, n_heads=2, n_key_value_heads=None)
    at(model, "L1.q", change=lambda q: 2 * q)
    assert doctor(model, layers=3).ok and doctor(model, layers=3).layers == "0, 6, 11 of 12"
    assert [check.name for check in doctor(model, layers=12).of("failed")] == ["q"]
    model.hook_dict.pop("blocks.5.hook_mlp_out")
    assert "mlp_out of layer 5" in doctor(model, layers=3).of("failed")[0].found


@pytest.mark.parametrize("call,said", [
    (lambda: doctor("tiny-gpt2"), "model 'tiny-gpt2' is a name; load it first"),
    (lambda: examined(None), "a model was expected, and a NoneType was given"),
    (lambda: doctor(hooked_model(), layers=0), "layers=0 is not a whole number above 1"),
    (lambda: doctor(hooked_model(), layers="all"), "layers='all' is not a whole number above 1"),
    (lambda: Diagnosis("m", (Check("q", "ok"),), "0").require(), "check 'hooks fire' is not made (has q)"),
])
def test_wrong_calls_are_refused(call, said):
    with pytest.raises((TypeError, ValueError)) as error: call()
    assert said in str(error.value)


# Asked for

def test_it_is_asked_once_for_each_model_and_weights():
    model = hooked_model()
    with count_passes(model, 1) as first: diagnosis = examined(model)
    with count_passes(model, 1) as second: assert examined(model) is diagnosis
    model.blocks[0].attn.W_O.mul_(2)
    with count_passes(model, 1) as third: assert examined(model) is not diagnosis
    assert first.forward == third.forward > 0 == second.forward
    with count_passes(hooked_model(), 1): assert examined(hooked_model()) is not diagnosis


def noisy(place):
    "The embedded model, with a hook point at a place that nobody reads."
    return at(load_model("tiny-gpt2"), place, Deaf)


def forbidden(*args, **kwargs): raise AssertionError("something was computed before the model was refused")


def test_the_search_refuses_before_anything_is_computed(task, monkeypatch):
    monkeypatch.setattr(discovery, "_require_accuracy", forbidden)
    with pytest.raises(ValueError) as error: find_cross_sections(noisy("L2.z"), task, sites=["z"], verbose=False)
    for part in ("tiny-gpt2 (TransformerBridge, float32)", "edits tell failed (at z of layer 2; measured 0, limit",
                 "leave these sites out"): assert part in str(error.value)


def test_the_search_goes_on_where_the_fault_does_not_matter(task, monkeypatch):
    monkeypatch.setattr(discovery, "_require_accuracy", forbidden)
    with pytest.raises(AssertionError, match="something was computed"):
        find_cross_sections(noisy("L2.k"), task, sites=["z"], verbose=False)


def test_an_evaluation_refuses_before_anything_is_computed(task, sections, truth, sae_sets, monkeypatch):
    for name in ("check_saes", "baselines", "outcomes"): monkeypatch.setattr(evaluation, name, forbidden)
    saes = sae_sets["tiny-gpt2-res-topk"]
    with pytest.raises(ValueError, match="edits tell failed"):
        evaluation.evaluate(noisy("L2.v"), task, sections, truth, saes, progress=False)


def test_the_report_has_it(model, task, sections, truth, sae_sets, tmp_path):
    z, = [section for section in sections if section.name == "S:z@END"]
    some = sections[[list(sections).index(z)]]
    saes = sae_sets["tiny-gpt2-res-topk"]
    report = evaluation.evaluate(model, task, some, truth, saes, tests=(1,), twins=False, progress=False)
    assert report.diagnosis == replace(examined(model), seconds=None)
    assert str(report).splitlines()[-1] == "doctor: 21 of 21 checks ok"
    report.save(tmp_path, page=False)
    again = SageReport.load(tmp_path)
    assert again.diagnosis == report.diagnosis and again.diagnosis.line in again._repr_html_()
    wrong = doctor(noisy("L2.v"))
    sick = replace(report, settings=report.settings | {"doctor": json.loads(json.dumps(wrong.record()))})
    assert "failed: edits tell failed (at v of layer 2" in str(sick).splitlines()[-1]
    old = replace(report, settings={name: value for name, value in report.settings.items() if name != "doctor"})
    assert old.diagnosis is None and "doctor" not in str(old) + old._repr_html_()


def test_what_is_not_a_number_is_null_in_json():
    record = doctor(overflow()).record()
    text = json.dumps(record, allow_nan=False)
    assert Diagnosis.of_record(json.loads(text)).record() == record


def test_all_that_experiments_need_is_checked():
    assert {*EXPERIMENTS} <= {check.name for check in doctor(hooked_model()).checks}


# On the command line

def test_the_command_says_whether_a_model_is_well(capsys):
    assert main(["doctor", "tiny-gpt2"]) == 0
    assert "right padding" in capsys.readouterr().out
    assert main(["doctor", "tiny-pythia", "--json"]) == 0
    assert Diagnosis.of_record(json.loads(capsys.readouterr().out)).ok
    assert main(["doctor", "tiny-gpt2", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_command_ends_with_1_where_a_check_failed(tmp_path, capsys):
    shutil.copytree(EMBEDDED / "tiny-gpt2", tmp_path / "mine")
    tokens_too_many().tokenizer.save_pretrained(tmp_path / "mine")
    assert main(["doctor", str(tmp_path / "mine")]) == 1
    out, err = capsys.readouterr()
    assert "it has more tokens than the model" in out
    assert err.splitlines()[-1] == f"sage_nb: model {str(tmp_path / 'mine')!r} failed 1 of 21 checks: tokenizer"
