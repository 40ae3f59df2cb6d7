"""Models and SAEs of the hub: real names, shapes and file formats, from a cache that a test wrote; what is missing."""
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sage_nb import evaluate, find_cross_sections, fit_dictionaries
from families import by_hand, hooked_transformer
from fake_hub import COMMIT, HTTP, add_to_cache, contents, no_network, refusal, repo_folder
from real_shapes import GEMMA, GPT2, PYTHIA, add_model, add_release, directions, identity_in
from sage_nb.core.activations import Node, n_heads
from sage_nb.core.models import EMBEDDED, ModelSettings, load_model
from sage_nb.lab.cli import Evaluate, main
from sage_nb.measures.certificate import Criteria
from sage_nb.saes.adapters import from_sae_lens, random_sae_lens
from sage_nb.saes.fidelity import check_saes
from sage_nb.saes.sets import SAESet, load_saes
from sage_nb.tasks.task import load_task

RES_JB, GEMMA_SCOPE = "gpt2-small-res-jb", "gemma-scope-2b-pt-res-canonical"
LM_SAE = "sae_bench_pythia70m_sweep_standard_ctx128_0712"
TINY = contents(EMBEDDED / "tiny-gpt2")


def questions(hub): return [asked for asked in hub.asked if "org/tiny" in asked]  # others are of the hub's library


def refused(function, *parts):
    "The one-line error of a function; it must hold all these parts."
    with pytest.raises(ValueError) as caught: function()
    said = str(caught.value)
    for part in parts: assert part in said, said
    return said


# Three real models in a cache, in the hub's own layout

@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    "GPT-2 small and Pythia-70M-deduped at true width, with few words, and SAEs of three releases in their formats."
    folder = tmp_path_factory.mktemp("real") / "hub"
    folder.mkdir()
    for name in (GPT2, PYTHIA): add_model(folder, name, vocabulary=2000)
    for layer in (0, 1):
        hook = f"blocks.{layer}.hook_resid_pre"
        add_release(folder, RES_JB, hook, hook, identity_in(directions(768, centred=True), 2048))
    hook = "blocks.0.hook_resid_post"
    add_release(folder, "pythia-70m-deduped-res-sm", hook, hook, identity_in(directions(512), 1024))
    hook = "blocks.3.hook_resid_post"
    add_release(folder, LM_SAE, f"{hook}__trainer_8", hook, identity_in(directions(512), 1024))
    return folder


@pytest.fixture
def real(real_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(real_cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return real_cache


@pytest.mark.parametrize("names", [("gpt2", "gpt2-small"), (PYTHIA, "pythia-70m-deduped")])
def test_a_model_is_loaded_by_each_of_its_names_and_says_what_transformers_says(real, names):
    official, short = (load_model(name) for name in names)
    assert official.cfg.model_name == short.cfg.model_name == names[0]
    tokens = torch.arange(3, 19)[None]
    theirs = AutoModelForCausalLM.from_pretrained(names[0])(tokens).logits
    for model in (official, short): assert_close(model(tokens), theirs, rtol=1e-4, atol=1e-4)


def test_a_release_says_what_it_was_made_on(real):
    saes = load_saes(RES_JB, ids="blocks.[01].*")
    assert saes.model_settings == ModelSettings("gpt2-small", prepend_bos=True, also=("center_writing_weights",))
    assert repr(saes).endswith("made on gpt2-small, with <bos>, center_writing_weights")
    assert all(sae.normalise == "centred" for sae in saes)
    assert load_saes("pythia-70m-deduped-res-sm", ids="blocks.0.hook_resid_post").model_settings.also == ()


def test_pythia_is_run_with_bos_as_its_saes_were_and_as_transformer_lens_does_not(real):
    saes = load_saes("pythia-70m-deduped-res-sm", ids="blocks.0.hook_resid_post")
    assert not load_model(PYTHIA).cfg.default_prepend_bos
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(PYTHIA, like=saes).cfg.default_prepend_bos
        assert load_model(like=saes).cfg.model_name == PYTHIA


# SAEs in each release's file format

def own_reading(release, label, x):
    "What sae_lens itself makes of the same file, on activations as its SAE expects them."
    from sae_lens import SAE
    sae = SAE.from_pretrained(release, label)
    return sae.decode(sae.encode(x))


@pytest.mark.parametrize("release, label, width, centred", [
    (RES_JB, "blocks.1.hook_resid_pre", 768, True),
    ("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_post", 512, False),
    (LM_SAE, "blocks.3.hook_resid_post__trainer_8", 512, False),
])
def test_what_goes_into_an_sae_of_a_release_comes_out(real, release, label, width, centred):
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(1)) + 0.5
    [sae] = load_saes(release, ids=label)
    assert_close(sae.reconstruct(x), x, rtol=1e-4, atol=1e-4)
    mean = x.mean(-1, keepdim=True) if centred else torch.zeros(50, 1)
    assert_close(sae.reconstruct(x), own_reading(release, label, x - mean) + mean, rtol=1e-5, atol=1e-5)


def test_what_goes_into_a_gemma_scope_sae_comes_out(cache):
    label, hook = "layer_0/width_16k/canonical", "blocks.0.hook_resid_post"
    add_release(cache, GEMMA_SCOPE, label, hook, identity_in(directions(2304), 16384))
    saes = load_saes(GEMMA_SCOPE, ids=label)
    [sae] = saes
    assert (sae.node, sae.d_sae, sae.architecture) == (Node("resid_post", 0), 16384, "jumprelu")
    assert saes.model_settings == ModelSettings("gemma-2-2b", prepend_bos=True)
    x = torch.randn(20, 2304, generator=torch.Generator().manual_seed(1))
    assert (sae.reconstruct(x) - x).abs().max() < 2e-3  # where a latent is below its threshold of 1e-3, it is 0
    assert_close(sae.reconstruct(x), own_reading(GEMMA_SCOPE, label, x), rtol=1e-5, atol=1e-5)


def test_of_two_widths_one_must_be_chosen_before_any_weights_are_there(cache):
    said = refused(lambda: load_saes(GEMMA_SCOPE), "has two SAEs at L5.resid_post, layer_5/width_16k/canonical and")
    pattern = said.rpartition("ids='")[2].partition("'")[0]
    assert fnmatch("layer_5/width_16k/canonical", pattern) and not fnmatch("layer_5/width_1m/canonical", pattern)
    assert not any(cache.iterdir())


def test_code_in_a_torch_file_is_not_run(cache, tmp_path):
    add_release(cache, LM_SAE, "blocks.3.hook_resid_post__trainer_8", "blocks.3.hook_resid_post",
                identity_in(directions(512), 1024))
    ran, path = tmp_path / "ran", next(cache.rglob("ae.pt"))
    class Trap:
        def __reduce__(self): return Path.touch, (ran,)
    path.unlink()
    torch.save({"encoder.weight": Trap()}, path)
    refused(lambda: load_saes(LM_SAE, ids="blocks.3.*trainer_8"), "holds more than tensors, which could run code, and")
    assert not ran.exists()


# Centred writing weights

@pytest.fixture(scope="module")
def centred_gpt2(hf_models, random_models):
    "A random GPT-2 as TransformerLens centres it, and as it is."
    processed = hooked_transformer(hf_models["gpt2"], random_models["gpt2"].tokenizer)
    processed.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    return processed, random_models["gpt2"]


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_attn_out",
                                  "blocks.1.hook_mlp_out", "blocks.3.hook_resid_post"])
@pytest.mark.parametrize("normalise", ["none", "constant_norm_rescale", "layer_norm"])
def test_saes_of_a_centred_model_say_the_same_on_one_that_is_not(centred_gpt2, hook, normalise):
    processed, plain = centred_gpt2
    sae = random_sae_lens("standard", normalise, hook, d_in=plain.cfg.d_model)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    view = from_sae_lens(sae)
    tokens = torch.arange(5, 45).view(4, 10)
    seen = processed.run_with_cache(tokens)[1][hook]
    x = plain.run_with_cache(tokens)[1][hook]
    assert (x.mean(-1).abs().max() > 0.01) and (seen.mean(-1).abs().max() < 1e-4)
    assert_close(view.dense_encode(x), sae.encode(seen), rtol=1e-3, atol=1e-3)
    assert_close(view.reconstruct(x) - x, sae.decode(sae.encode(seen)) - seen, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(replace(view, normalise="none").dense_encode(x), sae.encode(seen), atol=1e-3)


def test_a_set_that_does_not_say_that_it_is_of_a_centred_model_is_found_out(real):
    model = load_model(GPT2)
    task, said = load_task("ioi", model, n=48), load_saes(RES_JB, ids="blocks.[01].*")
    unsaid = SAESet(RES_JB, {node: replace(sae, normalise="none", metadata={}) for node, sae in said.saes.items()})
    table, without = (check_saes(model, task, saes, ["L1H0.v@IO"]) for saes in (said, unsaid))
    assert (table["variance explained"] > 0.999).all() and not table.cause.str.contains("center").any()
    assert (without["variance explained"] < 0.9).all() and without.cause.str.contains("center_writing_weights").all()


def test_centring_means_nothing_where_norms_are_rms(random_models):
    model = random_models["gemma"]
    sae = random_sae_lens("standard", d_in=model.cfg.d_model)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    table = check_saes(model, load_task("ioi", model, n=24), load_saes(sae), ["L2H0.v@IO"])
    assert table.verdict.tolist() == ["refused"] and "skips where norms are RMSNorm" in table.cause.iloc[0]


@pytest.mark.parametrize("name", ["gpt2", "gpt2-hooked"])
def test_folded_value_biases_are_missed_at_z(random_models, name):
    model = random_models[name]
    sae = random_sae_lens("standard", hook="blocks.1.attn.hook_z", d_in=model.cfg.d_model)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"fold_value_biases": True}
    table = check_saes(model, load_task("ioi", model, n=24), load_saes(sae), ["L1H0.z@END"])
    assert "fold_value_biases, which moves z" in table.cause.iloc[0]


# What is said where something is missing

def test_the_cache_is_that_of_hf_home_and_offline_is_kept(tmp_path):
    "In a process of its own, since the hub's library reads both when it is imported."
    add_to_cache(tmp_path / "hub", "org/tiny", TINY)
    asks = "print(hub_cache()); print(locate('org/tiny')); locate('org/no')"
    code = f"from sage_nb.core.hub import hub_cache, locate; {asks}"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"): env.pop(name, None)
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ended.stdout.splitlines() == [str(tmp_path / "hub"), str(hub_snapshot(tmp_path / "hub"))]
    said = ended.stderr.splitlines()[-1]
    remedy = "HF_HUB_OFFLINE is set, unset it to download"
    assert said == f"ValueError: org/no is not in the cache {str(tmp_path / 'hub')!r}; {remedy}"


def hub_snapshot(cache, repo="org/tiny"): return repo_folder(cache, repo) / "snapshots" / COMMIT


def test_a_model_is_fetched_once_and_then_found_in_the_cache(online, cache, monkeypatch):
    online.repos["org/tiny"] = TINY
    fetched = load_model("org/tiny")
    assert any(asked == f"GET /org/tiny/resolve/{COMMIT}/model.safetensors" for asked in online.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    online.asked.clear()
    again = load_model("org/tiny")
    assert not questions(online) and fetched.cfg.model_name == again.cfg.model_name == "org/tiny"
    assert_close(again.W_E, load_model("tiny-gpt2").W_E)


REFUSALS = [
    ("gated", lambda r: refusal(403, "GatedRepo"),
     "org/tiny is gated: accept its licence at https://huggingface.co/org/tiny, then log in with `hf auth login` or"),
    ("unknown", lambda r: None, "the hub has no 'org/tiny', or does not show it: check the name; if it is private,"),
    ("down", lambda r: HTTP.Response(503), "the hub answers 503 for org/tiny: try again later"),
    ("no network", no_network, "org/tiny is not in the cache", "https://huggingface.co cannot be reached, connect"),
    ("not a model", lambda r: refusal(404, "EntryNotFound"), "org/tiny lacks a file that is needed, config.json: see"),
]


@pytest.mark.parametrize("answer, parts", [pytest.param(a, p, id=name) for name, a, *p in REFUSALS])
def test_a_model_that_the_hub_does_not_give_is_refused_at_once(online, cache, monkeypatch, answer, parts):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    online.answer = answer
    failed = "model 'org/tiny' could not be loaded from the Hugging Face hub"
    said = refused(lambda: load_model("org/tiny"), failed, *parts)
    assert "\n" not in said and len(questions(online)) == 1
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_with_a_token_that_has_no_access_another_remedy_is_named(online, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
    online.answer = lambda request: refusal(403, "GatedRepo")
    refused(lambda: load_model("org/tiny"), "accept its licence at", "with the account whose token is used here")


def test_a_wrong_revision_is_named_with_and_without_network(online, cache, monkeypatch):
    online.repos["org/tiny"] = TINY
    refused(lambda: load_model("org/tiny", revision="v9"), "org/tiny has no revision 'v9': its branches, tags and")
    assert load_model("org/tiny", revision=COMMIT).cfg.n_layers == 4
    load_model("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: load_model("org/tiny", revision="v9"), "at revision 'v9' is not in the cache", "which has 'main'")


def test_without_network_a_whole_copy_is_loaded_with_a_warning_and_without_waiting(online, cache):
    add_to_cache(cache, "org/tiny", TINY)
    online.answer = no_network
    with pytest.warns(UserWarning, match="cannot be reached .*the copy of org/tiny in the cache is loaded"):
        assert load_model("org/tiny").cfg.d_model == 128
    assert len(questions(online)) == 1


def test_a_name_that_is_nearly_one_of_transformer_lens_is_taken_for_a_typo(online):
    refused(lambda: load_model("gpt2-smal"), "the hub has no 'gpt2-smal'", "did you mean 'gpt2-small'?")


def test_an_organisation_that_was_left_out_is_seen_in_the_cache(cache):
    add_to_cache(cache, "openai-community/gpt2", TINY)
    refused(lambda: load_model("gpt2"), "gpt2 is not in the cache", "which has 'openai-community/gpt2'")


def without(name): return {key: value for key, value in TINY.items() if key != name}


def sharded():
    "The files of a model whose second shard is missing."
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    return without("model.safetensors") | {"model.safetensors.index.json": index,
                                           "model-00001-of-00002.safetensors": TINY["model.safetensors"]}


@pytest.mark.parametrize("files, part", [
    (without("config.json"), "half-downloaded: no config.json"),
    (without("model.safetensors"), "half-downloaded: no model.safetensors"),
    (without("tokenizer.json") | {"tokenizer_config.json": None}, "half-downloaded: no tokenizer.json"),
    (sharded(), "half-downloaded: no model-00002-of-00002.safetensors"),
    (sharded() | {"model.safetensors.index.json": b"{"}, "index.json' is damaged or half-downloaded"),
])
def test_a_half_downloaded_copy_is_named(cache, files, part):
    add_to_cache(cache, "org/tiny", {name: content for name, content in files.items() if content is not None})
    (repo_folder(cache, "org/tiny") / "blobs" / "abc.incomplete").write_bytes(b"half")
    refused(lambda: load_model("org/tiny"), "model 'org/tiny'", part)


@pytest.mark.parametrize("name, content, part", [
    ("model.safetensors", TINY["model.safetensors"].read_bytes()[:-1000], "damaged or half-downloaded, get them again"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ("config.json", b'{"model_type": "gpt2"', "config.json' is damaged or half-downloaded"),
    ("tokenizer.json", b"<html>404</html>", "is a web page"),
])
@pytest.mark.parametrize("in_cache", [True, False])
def test_a_damaged_file_is_named(cache, tmp_path, name, content, part, in_cache):
    files = TINY | {name: content}
    snapshot = add_to_cache(cache, "org/tiny", files)
    folder = tmp_path / "mine"
    folder.mkdir()
    for each in files: (folder / each).write_bytes((snapshot / each).read_bytes())
    said = refused(lambda: load_model("org/tiny" if in_cache else folder), name, part)
    if in_cache: assert f"delete {str((snapshot / name).resolve())!r} first" in said


def test_what_breaks_off_leaves_nothing_that_looks_whole(online, cache):
    online.repos["org/tiny"] = TINY
    def broken(request):
        if request.method == "GET" and request.url.path.endswith("safetensors"):
            whole = TINY["model.safetensors"].read_bytes()
            return HTTP.Response(200, headers={"Content-Length": str(len(whole))}, content=whole[:1000])
    online.answer = broken
    refused(lambda: load_model("org/tiny"), "model 'org/tiny' could not be loaded")
    assert any(asked.startswith("GET") and asked.endswith("safetensors") for asked in questions(online))
    assert not any(path.name.endswith("safetensors") for path in cache.rglob("*"))
    assert not any(path.stat().st_size == 1000 for path in cache.rglob("*") if not path.name.endswith("incomplete"))
    online.answer = None
    assert load_model("org/tiny").cfg.n_layers == 4


def test_an_sae_that_cannot_be_fetched_is_named_with_its_reason(online, cache):
    online.answer = lambda request: refusal(404, "RepoNotFound")
    first = "SAE 'blocks.0.hook_resid_pre' of release 'gpt2-small-res-jb' could not be loaded: "
    refused(lambda: load_saes(RES_JB), first + "the hub has no 'jbloom/GPT2-Small-SAEs-Reformatted'")
    online.answer = lambda request: refusal(403, "GatedRepo")
    refused(lambda: load_saes(RES_JB), first + "jbloom/GPT2-Small-SAEs-Reformatted is gated: accept its licence")


def test_an_sae_that_is_not_in_the_cache_or_only_half_is_named(cache):
    refused(lambda: load_saes(RES_JB), "jbloom/GPT2-Small-SAEs-Reformatted is not in the cache", "HF_HUB_OFFLINE is")
    hook = "blocks.0.hook_resid_pre"
    add_release(cache, RES_JB, hook, hook, identity_in(directions(768, centred=True), 2048))
    refused(lambda: load_saes(RES_JB), "SAE 'blocks.1.hook_resid_pre' of release", "is not in its repository's copy in")
    weights = next(cache.rglob("sae_weights.safetensors"))
    whole = weights.read_bytes()
    weights.resolve().write_bytes(whole[:5000])
    refused(lambda: load_saes(RES_JB, ids=hook), "sae_weights.safetensors' are damaged or half-downloaded", "delete '")
    weights.unlink()
    refused(lambda: load_saes(RES_JB, ids=hook), "half-downloaded: it has only cfg.json; HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("release, label, hook, file", [
    (LM_SAE, "blocks.3.hook_resid_post__trainer_8", "blocks.3.hook_resid_post", "ae.pt"),
    (LM_SAE, "blocks.3.hook_resid_post__trainer_8", "blocks.3.hook_resid_post", "config.json"),
])
def test_half_a_file_of_another_format_is_named(cache, release, label, hook, file):
    add_release(cache, release, label, hook, identity_in(directions(512), 1024))
    path = next(cache.rglob(file))
    os.truncate(path.resolve(), path.stat().st_size // 2)
    refused(lambda: load_saes(release, ids=label), f"SAE {label!r}", file, "damaged or half-downloaded", "delete '")


# The whole pipeline

def planted(model):
    "The cross-section of IO that was planted: the values of its token in the last layer."
    last = model.cfg.n_layers - 1
    return by_hand("IO", [Node("v", last, head, "IO") for head in range(n_heads(model, "v"))])


def found(model, task): return find_cross_sections(model, task, "IO", "v", steps=1, max_prompts=24, verbose=False)


def scored(name, saes, n, sections=None):
    "A report by the calls of the README; what is planted moves Pos along, which the certificate may overlook."
    model = load_model(name, like=saes)
    task = load_task("ioi", model, n=n)
    sections = planted(model) if sections is None else sections(model, task)
    truth = fit_dictionaries(model, task, sections)
    return evaluate(model, task, sections, truth, saes, tests=(1,), twins=False, progress=False,
                    criteria=Criteria(max_off_target=1.0))


def check_report(report, saes):
    "An identity must come out of the whole pipeline as one."
    assert "IO:v@IO" in list(report.sections.section)
    table = report.fit[report.fit.set == saes.name]
    assert (table["variance explained"] > 0.999).all() and set(table.verdict) <= {"good", "doubtful"}
    of_saes = report.table[(report.table.sae == saes.name) & (report.table.metric == "fraction recovered")]
    assert len(of_saes) and (of_saes.value - 1).abs().max() < 1e-3
    assert report.settings["model"]["prepend_bos"]


@pytest.mark.parametrize("name, release, ids", [
    pytest.param("gpt2-small", RES_JB, "blocks.1.*", marks=pytest.mark.slow),
    ("pythia-70m-deduped", "pythia-70m-deduped-res-sm", "blocks.0.hook_resid_post"),
])
def test_a_model_and_a_release_of_the_hub_go_through_the_whole_pipeline(real, name, release, ids):
    saes = load_saes(release, ids=ids)
    check_report(scored(name, saes, n=72), saes)


@pytest.mark.slow
def test_gemma_and_gemma_scope_go_through_the_whole_pipeline(cache):
    label, hook = "layer_0/width_16k/canonical", "blocks.0.hook_resid_post"
    add_model(cache, GEMMA, vocabulary=2000)
    add_release(cache, GEMMA_SCOPE, label, hook, identity_in(directions(2304), 16384))
    saes = load_saes(GEMMA_SCOPE, ids=label)
    check_report(scored("gemma-2-2b", saes, n=72), saes)


@pytest.mark.slow
@pytest.mark.parametrize("release, label, hook, layers", [
    (LM_SAE, "blocks.3.hook_resid_post__trainer_8", "blocks.3.hook_resid_post", 5),
    ("pythia-70m-deduped-res-sm", "blocks.4.hook_resid_post", "blocks.4.hook_resid_post", 6),
])
def test_pythia_with_all_its_words_goes_through_the_whole_pipeline(cache, release, label, hook, layers):
    add_model(cache, PYTHIA, layers)
    add_release(cache, release, label, hook, identity_in(directions(512), 1024))
    saes = load_saes(release, ids=label)
    check_report(scored(PYTHIA, saes, 72, found), saes)


# On the command line

def test_the_command_line_runs_the_model_as_the_saes_say(real):
    saes = load_saes("pythia-70m-deduped-res-sm", ids="blocks.0.hook_resid_post")
    for sets, bos in (([saes], True), ([], False)):
        model, task = Evaluate(model="pythia-70m-deduped", n=24)._load(sets)
        assert (model.cfg.default_prepend_bos, task.prompts.tokens[0, 0] == model.tokenizer.bos_token_id) == (bos, bos)


@pytest.mark.parametrize("command, said", [
    ("evaluate --model pythia-70m-deduped --saes pythia-70m-deduped-res-sm --out {out}",
     "--saes pythia-70m-deduped-res-sm: SAE 'blocks.0.hook_resid_pre' of release 'pythia-70m-deduped-res-sm' could"),
    ("discover --model gpt2-small --revision v9", "gpt2 at revision 'v9' is not in the cache"),
    ("discover --model tiny-gpt2 --revision v9", "--revision v9 is for models of the hub, which 'tiny-gpt2' is not"),
    ("evaluate --model gpt2 --saes pythia-70m-deduped-res-sm", "were made for pythia-70m-deduped, not for gpt2: --"),
])
def test_the_command_line_says_in_one_line_what_is_missing(real, tmp_path, capsys, command, said):
    assert main(command.format(out=tmp_path / "out").split()) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]
