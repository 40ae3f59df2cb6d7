"""Transcoders: encoded from what the MLP reads, exact where it writes; and verdicts on sae_lens' list of releases."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import RANDOM
from families import hooked_transformer
from huggingface_hub.utils import RepositoryNotFoundError
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAEMetadata
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sage_nb.core.activations import Node, capture
from sage_nb.core.models import EMBEDDED, load_model
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.lab.releases import judge, model_architecture, predict
from sage_nb.report.evaluation import evaluate
from sage_nb.report.trials import twin_name
from sage_nb.saes.adapters import ARCHITECTURES, TRANSCODERS, from_sae_lens, random_sae_lens
from sage_nb.saes.baselines import random_decoder
from sage_nb.saes.codes import BlockEncoder, TranscoderInput, SparseSAE
from sage_nb.saes.fidelity import check_saes, next_token_loss, sae_inputs
from sage_nb.saes.reconstruction import decompose, reconstruct
from sage_nb.saes.routes import route_taken
from sage_nb.saes.sets import SAESet, load_saes
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import fit_dictionaries

MLP_OUT = Node("mlp_out", 1, None, "END")
READS = {"hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "ln2.hook_normalized": "mlp_normalized",
         "mlp.hook_in": "mlp_in"}
GEMMA_3 = "model.layers.1.pre_feedforward_layernorm.output"


def of_mlp(architecture="skip_transcoder", reads="ln2.hook_normalized", layer=1, d_in=128, **settings):
    "A random transcoder of sae_lens at a layer."
    hooks = dict(hook=f"blocks.{layer}.{reads}", hook_out=f"blocks.{layer}.hook_mlp_out")
    return random_sae_lens(architecture, d_in=d_in, d_sae=200, **hooks | settings)


@pytest.fixture(scope="module")
def zoo(): return {name: load_model(name) for name in ("tiny-gpt2", "tiny-pythia", "tiny-gemma")}


# The identity

def parts_of(model, prompts, theirs, reads):
    "The four parts by sae_lens' own functions, from what the model's own cache holds of the whole prompts."
    _, cache = model.run_with_cache(prompts.tokens)
    rows = torch.arange(len(prompts)), prompts.index("END")
    x, y = cache[f"blocks.1.{reads}"][rows], cache["blocks.1.hook_mlp_out"][rows]
    with torch.no_grad(): latents, whole = theirs.encode(x) @ theirs.W_dec, theirs(x)
    skip = whole - latents - theirs.b_dec
    return dict(latents=latents, bias=theirs.b_dec.expand_as(y), skip=skip, error=y - whole), y


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("name", RANDOM)
def test_parts_sum_to_mlp_out_and_each_is_that_of_sae_lens(random_models, name, reads):
    model = random_models[name]
    if f"blocks.1.{reads}" not in model.hook_dict:
        with pytest.raises(ValueError, match=f"has no L1.{READS[reads]} for it to read"):
            load_saes(of_mlp(reads=reads)).require(model)
        return
    prompts = load_task("ioi", model, n=24).prompts[:9]
    for architecture in ("jumprelu_skip_transcoder", "transcoder"):
        theirs = of_mlp(architecture, reads)
        parts = decompose(model, prompts, [MLP_OUT], load_saes(theirs), batch_size=4)[MLP_OUT]
        expected, y = parts_of(model, prompts, theirs, reads)
        assert (parts.skip is None) == (architecture == "transcoder")
        skip = torch.zeros_like(y) if parts.skip is None else parts.skip
        ours = dict(latents=parts.latents.sum(1), bias=parts.bias, skip=skip, error=parts.error)
        size = y.norm() + expected["latents"].norm()
        for part, value in ours.items(): assert (value - expected[part]).norm() <= 1e-5 * size, part
        assert (sum(ours.values()) - y).norm() <= 1e-6 * size
        rebuilt = reconstruct(model, prompts, [MLP_OUT], load_saes(theirs))[MLP_OUT]
        assert (rebuilt + parts.error - y).norm() <= 1e-6 * size


def test_two_classes_of_model_give_the_same_parts(random_models):
    for family in ("gpt2", "pythia", "gemma"):
        bridge, hooked = random_models[family], random_models[f"{family}-hooked"]
        prompts, saes = load_task("ioi", bridge, n=24).prompts[:6], load_saes(of_mlp())
        ours, theirs = (decompose(model, prompts, [MLP_OUT], saes)[MLP_OUT] for model in (bridge, hooked))
        for part in ("skip", "error"): assert_close(getattr(ours, part), getattr(theirs, part), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-pythia", "tiny-gemma"])
def test_sites_before_the_mlp_are_what_transformers_computes(zoo, name):
    model, seen = zoo[name], {}
    hf = AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32).eval()
    blocks = {"tiny-gpt2": "transformer.h", "tiny-pythia": "gpt_neox.layers", "tiny-gemma": "model.layers"}[name]
    hf.get_submodule(f"{blocks}.1.mlp").register_forward_pre_hook(lambda module, args: seen.update(mlp=args[0]))
    prompts = load_task("ioi", model, n=24).prompts[:5]
    with torch.no_grad(): hf(prompts.tokens)
    handed, normalized = (capture(model, prompts, [node])[node]
                          for node in (Node("mlp_in", 1), Node("mlp_normalized", 1)))
    assert_close(handed, seen["mlp"], rtol=1e-4, atol=1e-4)
    norm = model.blocks[1].ln2
    weight, bias = norm.weight + (name == "tiny-gemma"), getattr(norm, "bias", None)
    assert_close(normalized * weight + (0 if bias is None else bias), handed, rtol=1e-4, atol=1e-4)
    assert (normalized - handed).norm() > 0.03 * handed.norm(), "a norm without weights would not tell the two apart"


def test_what_is_put_in_place_of_mlp_out_is_what_the_model_would_do_with_the_transcoder_as_its_mlp(zoo):
    model, name = zoo["tiny-gemma"], "tiny-gemma"
    hf = AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32).eval()
    prompts, theirs = load_task("ioi", model, n=24).prompts[:4], of_mlp(reads="mlp.hook_in")
    sae, block = from_sae_lens(theirs), hf.model.layers[1]
    given = []
    block.mlp.register_forward_pre_hook(lambda module, args: given.append(args[0]))

    def transcoded(module, args, output): return torch.cat([output[:, :1], theirs(given[-1][:, 1:])], 1)
    block.post_feedforward_layernorm.register_forward_hook(transcoded)
    total = count = 0
    with torch.no_grad():
        for tokens, end in zip(prompts.tokens, prompts.index("END").tolist()):
            log_p = hf(tokens[None, :end + 1]).logits[0].log_softmax(-1)
            total -= sum(log_p[i, tokens[i + 1]].item() for i in range(end))
            count += end
    ours = next_token_loss(model, prompts, "L1.mlp_out", sae.reconstruct, reads=sae.reads())
    assert ours == pytest.approx(total / count, abs=1e-3)
    assert abs(ours - next_token_loss(model, prompts)) > 0.1


# Loading

@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_a_transcoder_from_disk_is_that_in_memory(architecture, tmp_path):
    theirs = of_mlp(architecture, d_in=16, d_out=12, normalise="layer_norm")
    theirs.save_model(tmp_path / "layer_1")
    view, stored = from_sae_lens(theirs), next(iter(load_saes(tmp_path)))
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    assert stored.digest == view.digest and (stored.node, stored.reads()) == (view.node, Node("mlp_normalized", 1))
    with torch.no_grad(): whole = theirs(x)
    assert_close(stored.reconstruct(x), whole, rtol=1e-4, atol=1e-4)
    assert_close(torch.cat([view.reconstruct(row[None]) for row in x]), whole, rtol=1e-4, atol=1e-4)


def test_a_file_with_another_skip_is_refused_before_it_is_read(tmp_path):
    of_mlp(d_in=16, d_out=12).save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"d_in": 12}))
    with pytest.raises(ValueError, match=r"W_skip of shape \(12, 16\), and by its cfg.json it is \(12, 12\)"):
        load_saes(tmp_path)


def test_half_precision_is_widened_in_the_skip_too():
    theirs = of_mlp(d_in=16).to(torch.bfloat16)
    view, x = from_sae_lens(theirs, dtype="bfloat16"), torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    assert view.reading.W_skip.dtype == torch.bfloat16
    assert_close(view.encode(x).skip, x @ theirs.W_skip.float().T)


def test_a_skip_without_a_bias_is_one():
    theirs = of_mlp("skip_transcoder", d_in=16)
    theirs.b_dec.data.zero_()
    view, x = from_sae_lens(theirs), torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): assert_close(view.reconstruct(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert_close(view.bias(view.encode(x)), view.encode(x).skip)


REFUSED = {
    "in another layer: a part of a cross-layer transcoder": dict(hook_out="blocks.2.hook_mlp_out"),
    "reads blocks.3.ln2.hook_normalized and writes blocks.1": dict(hook="blocks.3.ln2.hook_normalized"),
    "attention mixes tokens": dict(hook="blocks.1.hook_resid_pre", hook_out="blocks.1.hook_attn_out"),
    "write mlp_out, can be used here .attention": dict(hook="blocks.1.hook_resid_pre", hook_out="blocks.1.attn.hook_z"),
    "is nothing that an MLP reads": dict(hook="blocks.1.hook_resid_post"),
    "hook 'blocks.1.mlp.hook_post' is nothing that an MLP reads": dict(hook="blocks.1.mlp.hook_post"),
    "does not say where it writes": dict(hook_out=None),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_transcoder_of_an_mlp_is_refused(message):
    with pytest.raises(ValueError, match=message): load_saes(of_mlp(**REFUSED[message]))


def test_a_class_of_transcoder_that_nobody_has_looked_at_is_refused():
    theirs = of_mlp()
    class Config(type(theirs.cfg)):
        @classmethod
        def architecture(cls): return "gated_transcoder"
    theirs.cfg.__class__ = Config
    message = "of an architecture that is not known here, 'gated_transcoder"
    with pytest.raises(ValueError, match=message): load_saes(theirs)


def test_transformers_name_decides_where_transformer_lens_is_ambiguous():
    theirs = of_mlp(reads="hook_mlp_in")
    assert from_sae_lens(theirs).reads() == Node("resid_mid", 1)
    theirs.cfg.metadata.hf_hook_name = GEMMA_3
    assert from_sae_lens(theirs).reads() == Node("mlp_in", 1)
    theirs.cfg.metadata.hf_hook_name = "model.layers.1.post_attention_layernorm.output"
    with pytest.raises(ValueError, match="not known here: it may be before or after the norm"): from_sae_lens(theirs)


def test_widths_of_what_is_read_and_written_are_those_of_the_model(zoo):
    model = zoo["tiny-gpt2"]
    with pytest.raises(ValueError, match="holds 128 numbers at L1.mlp_normalized for it to read, not 64"):
        load_saes(of_mlp(d_in=64, d_out=128)).require(model)
    with pytest.raises(ValueError, match="activations of width 128 there, not 64"):
        load_saes(of_mlp(d_in=128, d_out=64)).require(model)
    with pytest.raises(ValueError, match="at L9.mlp_out, and the model has 4 layers"):
        load_saes(of_mlp(layer=9)).require(model)


def test_an_sae_of_the_embedding_stands_before_layer_0_where_no_positions_are_added(zoo):
    saes = load_saes(random_sae_lens("topk", hook="hook_embed", d_in=128))
    assert saes.before(0).node == Node("resid_pre", 0)
    for name in ("tiny-pythia", "tiny-gemma"): saes.require(zoo[name])
    with pytest.raises(ValueError, match="adds positions to its embedding"): saes.require(zoo["tiny-gpt2"])
    model = zoo["tiny-pythia"]
    prompts = load_task("ioi", model, n=24).prompts[:3]
    _, cache = model.run_with_cache(prompts.tokens)
    assert_close(cache["hook_embed"], capture(model, prompts, ["L0.resid_pre"])[Node("resid_pre", 0)])


# Fit, twins and an evaluation from end to end

def neurons(model, layer, k=512):
    "The MLP of a layer of tiny-gpt2 as a transcoder of it; without error, unless only the k largest neurons are kept."
    mlp = model.blocks[layer].mlp

    def fire(x, part):
        return torch.nn.functional.gelu(x @ mlp.W_in[:, part] + mlp.b_in[part], approximate="tanh")
    reading = TranscoderInput(Node("mlp_in", layer), 128)
    encoder = BlockEncoder(fire, 512, k)
    return SparseSAE(Node("mlp_out", layer), mlp.W_out, mlp.b_out, encoder, "neurons", reading=reading)


def skipping(model, prompts, layer):
    "The best linear map from what the MLP reads to what it writes, and a latent that says nothing."
    x, y = (sae_inputs(model, prompts, Node(site, layer)).double() for site in ("mlp_in", "mlp_out"))
    W = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution.T
    b, W = (y.mean(0) - W @ x.mean(0)).float(), W.float()
    reading = TranscoderInput(Node("mlp_in", layer), 128, W)
    def silent(x): return torch.ones(len(x), 4)
    return SparseSAE(Node("mlp_out", layer), torch.zeros(4, 128), b, silent, "skip", reading=reading)


@pytest.fixture(scope="module")
def lab(zoo):
    model = zoo["tiny-gpt2"]
    return model, load_task("ioi", model, n=192)


def test_the_fit_of_a_transcoder_is_that_of_what_it_writes(lab):
    model, task = lab
    saes = SAESet("neurons", {Node("mlp_out", 1): neurons(model, 1)})
    fit = check_saes(model, task, saes, ["L1.mlp_out@END"], max_prompts=24).iloc[0]
    assert fit.verdict == "good" and fit["variance explained"] > 0.999 and fit["loss recovered"] > 0.99
    wrong = replace(neurons(model, 3), node=Node("mlp_out", 1), reading=TranscoderInput("L1.mlp_in", 128))
    fit = check_saes(model, task, SAESet("wrong", {wrong.node: wrong}), ["L1.mlp_out@END"], max_prompts=24).iloc[0]
    assert fit.verdict == "refused" and "at L3.mlp_out" in fit.cause
    random = check_saes(model, task, load_saes(of_mlp("transcoder")), ["L1.mlp_out@END"], max_prompts=24).iloc[0]
    assert random.verdict == "refused"


def test_the_fit_finds_what_a_transcoder_was_made_to_read(lab):
    model, task = lab
    other = replace(neurons(model, 2), reading=TranscoderInput("L2.mlp_normalized", 128))  # without the norm's weights
    fit = check_saes(model, task, SAESet("other", {other.node: other}), ["L2.mlp_out@END"], max_prompts=24).iloc[0]
    assert fit.verdict == "refused" and "of the activations reading L2.mlp_in" in fit.cause, fit.cause


def test_a_twin_has_as_many_active_latents_as_its_transcoder_and_needs_what_that_reads(lab):
    model, task = lab
    theirs = of_mlp("jumprelu_skip_transcoder", "mlp.hook_in")
    theirs.threshold.data += 2.5  # so that few latents are active
    sae = from_sae_lens(theirs)
    reads, y = (sae_inputs(model, task.test.prompts, node) for node in (sae.reads(), sae.node))
    twin = random_decoder(sae, y, reads=reads)
    assert twin.reading is None and twin.W_dec.shape == sae.W_dec.shape
    assert 2 < sae.encode(reads).l0 < 20 and abs(twin.encode(y).l0 - sae.encode(reads).l0) <= 1
    assert abs(sae.encode(y).l0 - sae.encode(reads).l0) > 2, "the wrong input would not show"
    with pytest.raises(ValueError, match="give what that reads, the activations at L1.mlp_in, as `reads`"):
        random_decoder(sae, y)


def test_an_evaluation_of_transcoders_from_end_to_end(lab):
    model, task = lab
    found = find_cross_sections(model, task, "IO", "mlp_out", max_prompts=48, verbose=False)
    at_io = replace(found, sections=tuple(s for s in found if s.nodes[0].position == "IO"))
    layers = {node.layer for section in at_io for node in section.nodes}
    assert layers
    sets = [SAESet(name, {Node("mlp_out", layer): make(layer) for layer in layers}) for name, make in {
        "neurons": lambda layer: neurons(model, layer, k=40),
        "skip": lambda layer: skipping(model, task.train.prompts, layer)}.items()]
    assert route_taken(at_io.sections[0].nodes[0], sets[0]) == "direct"
    truth = fit_dictionaries(model, task, at_io)
    report = evaluate(model, task, at_io, truth, sets, tests=(1, 2), ks=(4,), progress=False)
    table = report.table.set_index(["sae", "metric"])
    def value(sae, metric): return table.loc[(sae, metric), "value"].mean()
    metrics = {metric for sae, metric in table.index if sae == "neurons"}
    sufficiency = next(metric for metric in metrics if metric.startswith("sufficiency"))
    assert value("neurons", sufficiency) > 0.8
    assert value("skip", sufficiency) > 0.9, "what the skip passes on counts as reconstructed"
    effect = next(metric for metric in metrics if "effect" in metric)
    assert value("skip", effect) == pytest.approx(0, abs=1e-6), "what no latent holds cannot be edited"
    assert value("neurons", effect) > 0.05
    assert twin_name("neurons") in set(report.table.sae)


# Releases

DIRECTORY = get_pretrained_saes_directory()
ONE_OF_EACH_READER = {entry.conversion_func: release for release, entry in DIRECTORY.items()}


def small(said, label):
    "An SAE of sae_lens that says what was predicted."
    known = said.architecture in ARCHITECTURES | TRANSCODERS
    settings = dict(n_heads=1, bottleneck_factor=64, kval_topk=4) if said.architecture == "temporal" else {}
    if known: sae = random_sae_lens(said.architecture, hook=said.hook_name, hook_out=said.hook_name_out, d_in=16)
    else: sae = SAE.from_dict(dict(architecture=said.architecture, d_in=16, d_sae=64, **settings))
    hooks = {key: getattr(said, key) for key in ("hook_name", "hook_name_out", "hf_hook_name")}
    sae.cfg.metadata = SAEMetadata(**hooks)
    return sae


@pytest.mark.parametrize("release", ONE_OF_EACH_READER.values(), ids=str)
def test_the_verdict_is_what_load_saes_does(monkeypatch, release):
    "For one release of each reader, with an SAE that says what its reader predicts."
    entry = DIRECTORY[release]
    monkeypatch.setattr(SAE, "from_pretrained", lambda release, label, device: small(predict(entry, label).said, label))
    for label in [*entry.saes_map][:: max(1, len(entry.saes_map) // 3)]:
        verdict = judge(entry, label)
        if verdict.verdict == "refused":
            cause = verdict.cause.partition("' ")[2].partition(" (")[0].split(":")[0][-40:]
            with pytest.raises(ValueError) as refusal: load_saes(release, ids=label)
            assert cause in str(refusal.value)
            continue
        sae, = load_saes(release, ids=label)
        assert (sae.node, sae.reads()) == (verdict.place.node, verdict.place.reads or sae.node)


def test_readers_are_all_known_and_models_listed():
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
    used = {entry.conversion_func or "sae_lens" for entry in DIRECTORY.values()}
    assert set(NAMED_PRETRAINED_SAE_LOADERS) - used == {"sparsify"}
    classes = {"gemma-2-2b": "Gemma2ForCausalLM", "gpt2-small": "GPT2LMHeadModel", "no-such-model": ""}
    assert {model: model_architecture(model) for model in classes} == classes


def test_predictions_touch_no_network_and_leave_the_readers_as_they_are(online, monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders as readers
    before = readers.hf_hub_download, readers.get_safetensors_tensor_shapes
    def refuse(*args, **kwargs): raise AssertionError("something was downloaded")
    monkeypatch.setattr("requests.sessions.Session.request", refuse)
    for release in ONE_OF_EACH_READER.values(): judge(DIRECTORY[release], next(iter(DIRECTORY[release].saes_map)))
    assert not online.asked
    assert (readers.hf_hub_download, readers.get_safetensors_tensor_shapes) == before
    with pytest.raises(RepositoryNotFoundError): before[0]("org/none", "cfg.json")
    assert online.asked, "what the readers ask without us would not show"
    with pytest.raises(AssertionError, match="downloaded"): before[1]("org/none", "sae.safetensors")


def test_a_release_is_loaded_by_a_name_with_a_pattern(monkeypatch):
    release, labels = "gemma-scope-2-1b-pt-transcoders", []
    entry = DIRECTORY[release]

    def fetch(release, label, device):
        labels.append(label)
        return small(predict(entry, label).said, label)
    monkeypatch.setattr(SAE, "from_pretrained", fetch)
    pattern = "transcoder/layer_*_width_16k_l0_big_affine"
    saes = load_saes(f"{release}:{pattern}")
    assert len(saes) == 4 and saes.name == f"{release} ({pattern})" and all("affine" in label for label in labels)
    assert {str(sae.reads()) for sae in saes} == {f"L{sae.node.layer}.mlp_in" for sae in saes}
    with pytest.raises(ValueError, match="as in ids='transcoder/layer_") as refusal: load_saes(release)
    assert "or by the name, 'gemma-scope-2-1b-pt-transcoders:transcoder/layer_*" in str(refusal.value)


def test_hooked_transformers_say_what_to_do_where_the_mlps_input_has_no_hook(zoo):
    hf = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny-gpt2", dtype=torch.float32)
    hooked = hooked_transformer(hf, zoo["tiny-gpt2"].tokenizer)
    with pytest.raises(ValueError, match="a HookedTransformer, has no L1.mlp_in.*TransformerBridge has one"):
        load_saes(of_mlp(reads="mlp.hook_in")).require(hooked)
