"""SAEs of every kind with random weights, for the tests."""
import torch
from sae_lens import SAE

from sage_nb.core.activations import Node
from sage_nb.saes.adapters import ARCHITECTURES, from_object, from_sae_lens
from sage_nb.saes.sets import SAESet
from sage_nb.saes.baselines import identity_sae, pca_sae, random_decoder

NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
KINDS = (*ARCHITECTURES, "layer_norm", "constant_norm_rescale", "own", "pca", "identity", "random decoder")


def random_sae_lens(architecture, normalise="none", hook="blocks.2.hook_resid_pre", d_in=16, d_sae=96, seed=0, **settings):
    "A sae_lens SAE, every weight random, and about a third of its latents active where that is not fixed."
    if architecture in ("topk", "abstopk"): settings = {"k": 5, "rescale_acts_by_decoder_norm": True} | settings
    if architecture == "matching_pursuit": settings = {"max_iterations": 12} | settings
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = SAE.from_dict(dict(architecture=architecture, d_in=d_in, d_sae=d_sae, normalize_activations=normalise,
                                 metadata=dict(hook_name=hook), **settings))
        for p in sae.parameters(): p.data += 1.2 / d_in**0.5 * torch.randn_like(p)
    if architecture == "jumprelu": sae.threshold.data.abs_()
    if architecture == "matching_pursuit": sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
    return sae


class Own:
    "An SAE that no library knows."

    def __init__(self, d_in, d_sae=96):
        g = torch.Generator().manual_seed(0)
        self.d_in, self.enc, self.dec = d_in, torch.randn(d_in, d_sae, generator=g), torch.randn(d_sae, d_in, generator=g) / 10

    def encode(self, x): return (x @ self.enc / self.d_in**0.5 - 0.5).relu()
    def decode(self, f): return f @ self.dec + 0.3


def random_sae(kind, node, x):
    "A view of the kind at a node, where the activations are like `x`; it reconstructs badly, except for identity."
    d_in = x.shape[-1]
    if kind == "own": return from_object(Own(d_in), node)
    if kind == "pca": return pca_sae(x, 5, node)
    if kind == "identity": return identity_sae(d_in, node)
    normalise = kind if kind in NORMALISATIONS else "none"
    architecture = kind if kind in ARCHITECTURES else "topk"
    sae = from_sae_lens(random_sae_lens(architecture, normalise, d_in=d_in), kind, node)
    return random_decoder(sae, x) if kind == "random decoder" else sae


def random_set(kind, acts):
    "Such a view at each node of captured activations."
    return SAESet(kind, {node: random_sae(kind, node, x.flatten(0, 1).flatten(1)) for node, x in acts.items()})
