"""Small models of many families, of transformers' own classes, with random weights; and what must hold of each."""
from dataclasses import replace
from functools import cache
from math import log
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pandas as pd
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizer_kinds import KINDS
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions as convert

from sage_nb import evaluate, fit_dictionaries
from sage_nb.core.activations import HEAD_SITES, Node, Prompts, capture, n_heads, run
from sage_nb.core.attention import Attention, key_head
from sage_nb.core.intervals import Estimate
from sage_nb.core.models import load_model
from sage_nb.core.sublayers import identity_errors
from sage_nb.discovery.attribution import Contrast, all_nodes, exact_effects, first_order, sites_of
from sage_nb.discovery.sections import CrossSection, CrossSections
from sage_nb.measures.certificate import Criteria
from sage_nb.report.report import SageReport
from sage_nb.saes.baselines import identity_sae
from sage_nb.saes.reconstruction import ProjectionSettings, reconstruct
from sage_nb.saes.sets import SAESet
from sage_nb.tasks.builtin import NAMES
from sage_nb.tasks.task import Task, task_from_rows

N_LAYERS, D_MODEL, N_HEADS, VOCAB, CONTEXT, WINDOW = 2, 48, 4, 97, 32, 6
CHECKED = (*HEAD_SITES, "attn_out", "mlp_out")

# The families

_WIDE = dict(num_hidden_layers=N_LAYERS, hidden_size=D_MODEL, num_attention_heads=N_HEADS, vocab_size=VOCAB,
             max_position_embeddings=CONTEXT)
_SHARED = _WIDE | dict(num_key_value_heads=2, intermediate_size=64)
_LOCAL = dict(head_dim=16, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
_SHORT = dict(n_layer=N_LAYERS, n_embd=D_MODEL, n_head=N_HEADS, n_positions=CONTEXT, vocab_size=VOCAB)
_LLAMA_3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=16)
_TWO_TABLES = dict(sliding_attention=dict(rope_type="default", rope_theta=100.0),
                   full_attention=dict(rope_type="default", rope_theta=10000.0))

CONFIGS = {  # family -> class of the configuration, class of the model, options
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, _SHORT),
    "pythia": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, _WIDE | dict(intermediate_size=64, rotary_pct=0.5)),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, _WIDE | dict(ffn_dim=64, word_embed_proj_dim=D_MODEL)),
    "gpt-j": (hf.GPTJConfig, hf.GPTJForCausalLM, _SHORT | dict(rotary_dim=8)),
    "phi": (hf.PhiConfig, hf.PhiForCausalLM, _WIDE | dict(intermediate_size=64, partial_rotary_factor=0.5)),
    "llama-3": (hf.LlamaConfig, hf.LlamaForCausalLM, _SHARED | dict(rope_parameters=_LLAMA_3)),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, _SHARED | dict(sliding_window=WINDOW, head_dim=16)),
    "qwen-2.5": (hf.Qwen2Config, hf.Qwen2ForCausalLM, _SHARED),
    "qwen-3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, _SHARED | dict(head_dim=16)),
    "gemma-2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, _SHARED | _LOCAL | dict(
        query_pre_attn_scalar=16, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)),
    "gemma-3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, _SHARED | _LOCAL | dict(
        query_pre_attn_scalar=16, rope_parameters=_TWO_TABLES)),
    "gpt-oss": (hf.GptOssConfig, hf.GptOssForCausalLM, _SHARED | _LOCAL | dict(
        num_local_experts=4, num_experts_per_tok=2)),
    "qwen-3.5": (hf.Qwen3_5TextConfig, hf.Qwen3_5ForCausalLM, _SHARED | dict(
        head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)),
}
KIND_OF = {  # family -> the kind of its tokenizer, where that is not GPT-2's, or like it
    "llama-3": "llama3", "mistral": "llama2", "gpt-oss": "llama3", "qwen-2.5": "qwen", "qwen-3": "qwen",
    "qwen-3.5": "qwen", "gemma-2": "gemma", "gemma-3": "gemma"}


def build(family, words=VOCAB):
    "A transformers model with random weights, so large that no bias is 0, no norm 1 and no pattern uniform."
    config, kind, options = CONFIGS[family]
    torch.manual_seed(0)
    model = kind(config(**options | {"vocab_size": words}, attn_implementation="eager")).eval().requires_grad_(False)
    for p in model.parameters(): p += 0.15 * torch.randn_like(p)
    return model


def save(model, folder, tokenizer=None):
    "The folder that `load_model` reads; by default with a tokenizer of words, which nothing needs but its being there."
    if tokenizer is None:
        words = {"<bos>": 0, "<unk>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
        made = Tokenizer(WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = WhitespaceSplit()
        special = dict(bos_token="<bos>", eos_token="<bos>", unk_token="<unk>", pad_token="<pad>")
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


# The same models as HookedTransformers

def _hooked_short(c): return dict(
    n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, n_heads=c.n_head, d_head=c.n_embd // c.n_head,
    act_fn="gelu_new", eps=c.layer_norm_epsilon, normalization_type="LN")


def _hooked_wide(c): return dict(
    n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=c.max_position_embeddings, n_heads=c.num_attention_heads,
    d_head=c.hidden_size // c.num_attention_heads, normalization_type="LN", eps=getattr(c, "layer_norm_eps", 1e-5),
    d_mlp=getattr(c, "intermediate_size", None) or c.ffn_dim)


def _hooked_shared(c): return _hooked_wide(c) | dict(
    d_head=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads, gated_mlp=True,
    n_key_value_heads=c.num_key_value_heads, act_fn=getattr(c, "hidden_act", "silu"), eps=c.rms_norm_eps,
    normalization_type="RMS", final_rms=True, positional_embedding_type="rotary", rotary_adjacent_pairs=False,
    rotary_base=c.rope_parameters.get("rope_theta", 10000.0))


def _kinds(c): return getattr(c, "layer_types", None) or ["sliding_attention"] * c.num_hidden_layers  # as Mistral's


def _hooked_local(c): return _hooked_shared(c) | dict(
    use_local_attn=True, window_size=c.sliding_window,
    attn_types=["local" if kind == "sliding_attention" else "global" for kind in _kinds(c)])


def _hooked_gemma(c): return _hooked_local(c) | dict(
    act_fn=c.hidden_activation, use_normalization_before_and_after=True,
    attn_scores_soft_cap=c.attn_logit_softcapping or -1.0, output_logits_soft_cap=c.final_logit_softcapping or -1.0)


def _rotary(dim): return dict(positional_embedding_type="rotary", parallel_attn_mlp=True, rotary_adjacent_pairs=False,
                              rotary_dim=round(dim))


def _hooked_parallel(c): return _hooked_wide(c) | _rotary(
    c.rope_parameters["partial_rotary_factor"] * c.hidden_size / c.num_attention_heads)


def _by_parts(rope): return dict(
    use_NTK_by_parts_rope=True, NTK_original_ctx_len=rope["original_max_position_embeddings"],
    NTK_by_parts_low_freq_factor=rope["low_freq_factor"], NTK_by_parts_high_freq_factor=rope["high_freq_factor"],
    NTK_by_parts_factor=rope["factor"])


def _yarn(rope): return dict(
    use_yarn_rope=True, yarn_factor=rope["factor"], yarn_attention_factor=0.1 * log(rope["factor"]) + 1,
    yarn_beta_fast=rope["beta_fast"], yarn_beta_slow=rope["beta_slow"], yarn_truncate=rope["truncate"],
    yarn_original_max_position_embeddings=rope["original_max_position_embeddings"])


def _experts(c): return dict(num_experts=c.num_local_experts, experts_per_token=c.num_experts_per_tok)


HOOKED = {  # family -> options of its HookedTransformerConfig, TransformerLens's conversion of its weights
    "gpt2": (_hooked_short, convert.convert_gpt2_weights),
    "pythia": (lambda c: _hooked_parallel(c) | dict(act_fn=c.hidden_act), convert.convert_neox_weights),
    "opt": (lambda c: _hooked_wide(c) | dict(act_fn="relu"), convert.convert_opt_weights),
    "gpt-j": (lambda c: _hooked_short(c) | _rotary(c.rotary_dim) | dict(rotary_adjacent_pairs=True),
              convert.convert_gptj_weights),
    "phi": (lambda c: _hooked_parallel(c) | dict(act_fn=c.hidden_act), convert.convert_phi_weights),
    "llama-3": (lambda c: _hooked_shared(c) | _by_parts(c.rope_parameters), convert.convert_llama_weights),
    "mistral": (_hooked_local, convert.convert_mistral_weights),
    "qwen-2.5": (_hooked_shared, convert.convert_qwen2_weights),
    "qwen-3": (lambda c: _hooked_shared(c) | dict(use_qk_norm=True), convert.convert_qwen3_weights),
    "gemma-2": (_hooked_gemma, convert.convert_gemma_weights),
    "gemma-3": (lambda c: _hooked_gemma(c) | dict(use_qk_norm=True, rotary_base_local=100.0),
                convert.convert_gemma_weights),
    "gpt-oss": (lambda c: _hooked_local(c) | _yarn(c.rope_parameters) | _experts(c) | dict(use_attention_sinks=True),
                convert.convert_gpt_oss_weights),
}


def hooked_transformer(model, tokenizer=None):
    "A transformers model as a HookedTransformer, by TransformerLens's own conversion of its weights."
    options, converted = HOOKED[next(family for family, (_, kind, _) in CONFIGS.items() if type(model) is kind)]
    cfg = HookedTransformerConfig(d_vocab=model.config.vocab_size, default_prepend_bos=True,
                                  original_architecture=type(model).__name__, **options(model.config))
    twin = HookedTransformer(cfg)
    missing, unexpected = twin.load_state_dict(converted(model, cfg), strict=False)
    made = ("mask", "IGNORE", "rotary_sin", "rotary_cos", "b_U")  # by the model itself; b_U is zero where it is missing
    assert not unexpected and all(name.rpartition(".")[2] in made for name in missing), (missing, unexpected)
    twin.tokenizer = tokenizer
    return twin.eval().requires_grad_(False)


class Made(NamedTuple):
    "One family's model in the classes of two libraries."
    family: str
    theirs: torch.nn.Module  # transformers' own
    bridge: object
    hooked: object  # None where TransformerLens has no such HookedTransformer


def made_of(family, theirs, tokenizer=None, bos=True) -> Made:
    with TemporaryDirectory() as folder: bridge = load_model(save(theirs, folder, tokenizer))
    hooked = hooked_transformer(theirs, bridge.tokenizer) if family in HOOKED else None
    for model in filter(None, (bridge, hooked)): model.cfg.default_prepend_bos = bos
    return Made(family, theirs, bridge, hooked)


@cache
def make(family) -> Made: return made_of(family, build(family))


@cache
def make_reader(family) -> Made:
    "The same with a tokenizer of the family's kind, which knows the words of the tasks."
    tokenizer = KINDS[KIND_OF.get(family, "gpt2")]()
    return made_of(family, build(family, len(tokenizer)), tokenizer, tokenizer.bos_token is not None)


# Prompts, given as tokens

@cache
def contrast() -> Contrast:
    "Prompts longer than the window, and counterfactuals in which the token at A differs, and that before it."
    g = torch.Generator().manual_seed(1)
    tokens, a, end = torch.randint(3, VOCAB, (4, 12), generator=g), torch.tensor([5, 6, 7, 8]), [11, 10, 11, 9]
    cf, rows = tokens.clone(), torch.arange(4)
    for place in (a, a - 1): cf[rows, place] = torch.randint(3, VOCAB, (4,), generator=g)
    positions = {"A": a, "END": torch.tensor(end)}
    def metric(logits, rows): return logits[:, 5] - logits[:, 6]
    return Contrast(Prompts(tokens, positions), Prompts(cf, positions), metric)


# By transformers' own modules and hooks alone

_SEPARATE = dict(layers="model.layers", attn="self_attn", z="o_proj", attn_out="self_attn.o_proj", mlp_out="mlp")
_POST_NORMS = _SEPARATE | dict(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
WHERE = {family: _SEPARATE for family in CONFIGS} | {
    "gpt2": dict(layers="transformer.h", attn="attn", fused="c_attn", z="c_proj", attn_out="attn.c_proj",
                 mlp_out="mlp"),
    "pythia": dict(layers="gpt_neox.layers", attn="attention", fused="query_key_value", z="dense",
                   attn_out="attention.dense", mlp_out="mlp"),
    "opt": _SEPARATE | dict(layers="model.decoder.layers", z="out_proj", attn_out="self_attn.out_proj", mlp_out="fc2"),
    "gpt-j": dict(layers="transformer.h", attn="attn", z="out_proj", attn_out="attn.out_proj", mlp_out="mlp"),
    "phi": _SEPARATE | dict(z="dense", attn_out="self_attn.dense"),
    "gemma-2": _POST_NORMS, "gemma-3": _POST_NORMS,
}


class Place(NamedTuple):
    "Where transformers holds a node."
    module: torch.nn.Module
    read: bool  # its input, not its output
    entries: slice

    @classmethod
    def of(cls, made: Made, node: Node) -> "Place":
        names, d = WHERE[made.family], made.bridge.cfg.d_head
        layer = made.theirs.get_submodule(names["layers"])[node.layer]
        if node.head is None: return cls(layer.get_submodule(names[node.site]), False, slice(None))
        attn, number, width = layer.get_submodule(names["attn"]), "qkv".find(node.site), d
        start = node.head * d
        if node.site == "z": return cls(attn.get_submodule(names["z"]), True, slice(start, start + d))
        if made.family == "gpt2": start += number * N_HEADS * d  # all queries, all keys, all values
        if made.family == "pythia": start = (3 * node.head + number) * d  # head by head
        name = names.get("fused", f"{node.site}_proj")
        return cls(attn.get_submodule(name), False, slice(start, start + width))

    def hook(self, see):
        "Let `see` have what the module holds, tokens × entries; what it returns takes its place."
        def inner(x):
            flat = x[0] if isinstance(x, tuple) else x
            seen = see(flat.reshape(4, 12, -1))
            if seen is None: return None
            return (seen.reshape(flat.shape), *x[1:]) if isinstance(x, tuple) else seen.reshape(flat.shape)
        if self.read: return self.module.register_forward_pre_hook(lambda module, args: inner(args))
        return self.module.register_forward_hook(lambda module, args, output: inner(output))


@cache
def held(family, side, node: Node):
    "What transformers' model holds at every token of the prompts, or of their counterfactuals (`cf`)."
    made, seen = make(family), []
    place = Place.of(made, node)
    handle = place.hook(lambda x: seen.append(x[..., place.entries].clone()))
    try: made.theirs(getattr(contrast(), side).tokens)
    finally: handle.remove()
    return seen[0]


def patched(made: Made, case: Contrast, node: Node):
    "A run of transformers' model with a node as in the counterfactual: the metric, and its attention patterns."
    index, rows = case.prompts.index(node.position), torch.arange(4)
    place, value = Place.of(made, node), held(made.family, "cf", node)[rows, case.cf.index(node.position)]

    def put(x):
        x = x.clone()
        x[rows, index, place.entries] = value
        return x
    handle = place.hook(put)
    try: return asked(made, case)
    finally: handle.remove()


def asked(made: Made, case: Contrast):
    "The metric of transformers' model, and its attention patterns: prompt, head, query, key for each layer."
    output = made.theirs(case.prompts.tokens, output_attentions=True)
    return case.metric(output.logits[torch.arange(4), case.prompts.index("END")], slice(None)), output.attentions


@cache
def exact_by_hand(family):
    "The effect of each node, by transformers' own hooks."
    made, case = make(family), contrast()
    clean, _ = asked(made, case)
    return torch.stack([patched(made, case, node)[0] - clean for node in nodes_of(made.bridge, CHECKED)], 1)


def slopes_at_z(made: Made, case: Contrast, layer: int):
    "The gradient of the metric at the outputs of all heads of a layer."
    place, z = Place.of(made, Node("z", layer, 0)), []

    def keep(x):
        z.append(x)
        return x
    handles = [place.hook(keep), made.theirs.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_())]
    try:
        with torch.enable_grad(): slopes, = torch.autograd.grad(asked(made, case)[0].sum(), z)
    finally:
        for handle in handles: handle.remove()
    return slopes.unflatten(-1, (N_HEADS, -1))


@cache
def fixed_by_hand(family):
    "The QK fix of each query or key: how the pattern moves in a real run, times the slope at the pattern."
    made, case = make(family), contrast()
    _, before = asked(made, case)
    slopes = [slopes_at_z(made, case, layer) for layer in range(N_LAYERS)]

    def effect(node):
        layer, (_, after) = node.layer, patched(made, case, node)
        total = 0
        for head in range(N_HEADS):
            v = held(family, "prompts", Node("v", layer, key_head(made.bridge, head)))
            moved = (after[layer] - before[layer])[:, head]
            total += ((moved @ v) * slopes[layer][:, :, head]).sum((1, 2))
        return total
    return torch.stack([effect(node) for node in nodes_of(made.bridge, ("q", "k"))], 1)


# What is measured

def off(ours, theirs): return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def nodes_of(model, sites):
    have = sites_of(model)
    return all_nodes(model, ["A", "END"], [site for site in sites if site in have])


def off_exact(made: Made, model):
    "How far exact patching is from transformers' own hooks."
    nodes = nodes_of(model, CHECKED)
    return off(exact_effects(model, contrast(), nodes).effect, exact_by_hand(made.family))


def off_identity(model):
    "How far each site is from what the maps claim, the worst of all layers that have it and attention."
    prompts, errors = contrast().prompts, {}
    layers = [layer for layer, block in enumerate(model.blocks) if hasattr(block, "attn")]
    for site in set(CHECKED) & set(sites_of(model)):
        errors[site] = max(identity_errors(model, prompts, [(site, layer) for layer in layers]).values())
    return errors


@cache
def off_fixed(family, kind):
    "How far the QK fix is from what it is by hand; and how far it is from the true effects, and plain slopes are."
    model, case = getattr(make(family), kind), contrast()
    nodes = nodes_of(model, ("q", "k"))
    fixed, plain = (first_order(model, case, nodes, qk_fix=fix).effect for fix in (True, False))
    exact = exact_effects(model, case, nodes).effect
    far = [((effect - exact).norm() / exact.norm()).item() for effect in (fixed, plain)]
    return off(fixed, fixed_by_hand(family)), *far


def off_pattern(made: Made, model):
    "How far recomputed patterns are from transformers' own: of the clean run, and with another query or key."
    case, worst = contrast(), 0.0
    for layer in range(N_LAYERS):
        acts = capture(model, case.prompts, Attention.reads(model, layer))
        there = capture(model, case.cf, [Node("q", layer, None, "A"), Node("k", layer, None, "A")])
        attention = Attention.of(model, layer, acts)
        q, k = acts[Node("q", layer)], acts[Node("k", layer)]
        worst = max(worst, off(attention.pattern(q, k).transpose(1, 2), asked(made, case)[1][layer]))
        for site, value in (("q", there[Node("q", layer, None, "A")]), ("k", there[Node("k", layer, None, "A")])):
            head, x = n_heads(model, site) - 1, {"q": q.clone(), "k": k.clone()}
            x[site][torch.arange(4), case.prompts.index("A"), head] = value[:, head]
            true = patched(made, case, Node(site, layer, head, "A"))[1][layer]
            worst = max(worst, off(attention.pattern(x["q"], x["k"]).transpose(1, 2), true))
    return worst


def off_recomputed(model):
    "How far z is from what an SAE that misses nothing makes of it by a recomputed pattern and scale."
    node, settings = Node("z", 1, 3, "END"), ProjectionSettings(scale="recomputed", pattern="recomputed")
    sae = identity_sae(D_MODEL, Node("resid_pre", 1))
    prompts = contrast().prompts
    return off(reconstruct(model, prompts, [node], sae, settings)[node], capture(model, prompts, [node])[node])


# The whole pipeline, on prompts whose answers are the model's own

LENIENT = Criteria(min_r2=-1.0, tolerance=10.0, max_off_target=1.0, min_prompts=2)
VALUES, FILLERS = ("Mary", "John", "Sarah", "Tom", "Anna", "James"), NAMES[6:18]


def own_rows():
    "Prompts in which a name, X, is one of six; their answers are not the model's."
    def said(filler, value): return {"prompt": f"the {filler} {value} said", "answer": " ball"}
    return [said(filler, value) | {
        "distractor": " book", "attributes": {"X": value}, "positions": {"X": value},
        "held_out": filler in FILLERS[8:], "counterfactuals": {"X": said(filler, other) | {"value": other}}}
        for filler in FILLERS for value, other in zip(VALUES, VALUES[1:] + VALUES[:1])]


def own_task(model) -> Task:
    "A task that a model with random weights solves: its answers rise most reliably with X, and distractors fall."
    task = task_from_rows(own_rows(), model)
    logits = run(model, task.prompts).unflatten(0, (len(FILLERS), len(VALUES)))
    rise = logits - logits.mean((0, 1))
    rise = rise.mean(0) / rise.std(0)
    cf, best, worst = task.counterfactual("X"), rise.argmax(-1), rise.argmin(-1)
    here, there = (torch.tensor([VALUES.index(value) for value in values]) for values in (task.attributes.X, cf.values))
    cf = replace(cf, answers=best[there], distractors=best[there])
    assert len(set(best.tolist())) == len(VALUES)
    return replace(task, answers=best[here], distractors=worst[here], counterfactuals={"X": cf})


def by_hand(attribute, *groups) -> CrossSections:
    "Cross-sections of an attribute as if they had been found; each is given by its nodes."
    none = Estimate(0.0, 0.0, 0.0, 1)
    found = [CrossSection(attribute, nodes[0].site, nodes[0].position, tuple(nodes), (0.0,) * len(nodes),
                          {len(nodes): none}, none) for nodes in groups]
    return CrossSections(tuple(found), pd.DataFrame(), {attribute: None}, {})


def evaluated(model) -> SageReport:
    "An evaluation of identities in the stream, at the sites that they can be projected to, but q."
    gated = not all(hasattr(block, "attn") for block in model.blocks)  # and gated heads are no mixture of values
    at_end = ["resid_pre"] if gated else ["z", "attn_out", "mlp_out"]
    places = {"k": "X", "v": "X"} | dict.fromkeys(at_end, "END")
    nodes = all_nodes(model, ["X", "END"], [*places])
    task, sections = own_task(model), by_hand("X", *(
        [node for node in nodes if (node.site, node.position) == place] for place in places.items()))
    streams = [Node("resid_pre", 0), Node("resid_pre", 1), Node("resid_post", 1)]
    saes = SAESet("ours", {node: identity_sae(D_MODEL, node, "ours") for node in streams})
    truth = fit_dictionaries(model, task, sections)
    return evaluate(model, task, sections, truth, saes, ks=(1,), twins=False, progress=False, criteria=LENIENT)


def off_evaluated(report: SageReport):
    "How far identities are from giving all back, in the sections that count; nan where a number that is defined is."
    counted = report.sections.section[report.sections.counts]
    ours = report.table[(report.table.sae == "ours") & report.table.section.isin(counted)].set_index("metric").value
    undefined = ["normalised success", "edit magnitude", "isolation"]  # of one attribute, and where no edit succeeds
    if not ours.drop(undefined).abs().max(skipna=False) < float("inf"): return float("nan")
    return (ours[ours.index == "fraction recovered"] - 1).abs().max()
