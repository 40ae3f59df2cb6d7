"""SAEs of every kind with random weights, for the tests."""
import torch

from sage_nb.core.activations import Node
from sage_nb.saes.adapters import ARCHITECTURES, from_object, from_sae_lens, random_sae_lens
from sage_nb.saes.baselines import identity_sae, pca_sae, random_decoder
from sage_nb.saes.codes import SparseSAE
from sage_nb.saes.sets import SAESet

NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
KINDS = (*ARCHITECTURES, "layer_norm", "constant_norm_rescale", "own", "pca", "identity", "random decoder")


class Own:
    "An SAE that no library knows."

    def __init__(self, d_in, d_sae=96):
        g = torch.Generator().manual_seed(0)
        self.d_in = d_in
        self.enc = torch.randn(d_in, d_sae, generator=g)
        self.dec = torch.randn(d_sae, d_in, generator=g) / 10

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


def random_saes(d_model=128, d_sae=200, layers=4):
    "SAEs of every stream that reconstruct badly, with a different number of active latents on every token."
    g = torch.Generator().manual_seed(0)

    def draw(*shape): return torch.randn(*shape, generator=g)

    def sae(layer):
        W_enc, b_enc = draw(d_model, d_sae) / d_model**0.5, draw(d_sae)
        W_dec, b_dec = 0.3 * draw(d_sae, d_model), 0.2 + 0.1 * draw(d_model)
        return SparseSAE(Node("resid_pre", layer), W_dec, b_dec, lambda x: (x @ W_enc + b_enc - 2).relu(), "random")
    return SAESet("random", {Node("resid_pre", layer): sae(layer) for layer in range(layers + 1)})
