"""Wrong calls of the rooms of SAEs: each is refused, and the error names the thing, the value and the remedy."""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sage_nb.core.activations import Node
from sage_nb.core.models import EMBEDDED
from sage_nb.saes.adapters import as_dtype, from_object, from_sae_lens, node_of_hook, random_sae_lens
from sage_nb.saes.baselines import identity_sae, pca_sae, random_decoder, supervised_as_sae
from sage_nb.saes.codes import BlockEncoder, Codes, Pursuit, SparseSAE, normalised, to_codes
from sage_nb.saes.routes import node_shares, route_taken, sources
from sage_nb.saes.sets import SAESet, check_files, load_saes

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


@pytest.fixture(scope="session")
def fixtures(model, tmp_path_factory):
    "A model, good SAEs, and a folder for bad ones."
    place = Node("resid_pre", 3)
    saes, topk = load_saes("tiny-gpt2-res-topk"), random_sae_lens("topk")
    prompts = SimpleNamespace(tokens=torch.randint(5, 200, (4, 9)), positions={})
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    toy = SparseSAE("L0.resid_pre", torch.eye(4), torch.zeros(4), torch.relu, "toy")
    return SimpleNamespace(model=model, saes=saes, sae=saes.before(3), topk=topk, x=x, toy=toy, place=place,
                           prompts=prompts, folder=lambda: tmp_path_factory.mktemp("saes"))


class Own:
    "An SAE of one's own, of four numbers; parts of it are replaced by what is wrong."
    hook_name = "blocks.1.hook_resid_pre"
    d_in = 4
    W_dec = torch.cat([torch.eye(4), -torch.eye(4)])
    def encode(self, x): return (x @ self.W_dec.T).relu()
    def decode(self, f): return f @ self.W_dec


def own(**parts):
    kept = {name: part for name, part in vars(Own).items() if not name.startswith("__")}
    whole = {name: part for name, part in (kept | parts).items() if part is not None}
    return type("Own", (), whole)()


def altered(f, name, index, value, architecture="topk"):
    "A sae_lens SAE with one weight that is wrong."
    sae = random_sae_lens(architecture)
    getattr(sae, name).data[index] = value
    return sae


def two_folders(f, harm):
    "What is said of a folder of two SAEs, one of them harmed."
    folder = f.folder()
    for hook in ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"):
        shutil.copytree(EMBEDDED / "saes" / "tiny-gpt2-res-topk" / hook, folder / hook)
    harm(folder / "blocks.2.hook_resid_pre")
    return load_saes(folder)


def cfg_with(**changes):
    "A harm: settings that are wrong; None takes one away."
    def harm(folder):
        said = json.loads((folder / CFG).read_text()) | changes
        (folder / CFG).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return harm


def hooked_at(name):
    "A harm: a hook name that is wrong."
    def harm(folder):
        said = json.loads((folder / CFG).read_text())
        (folder / CFG).write_text(json.dumps(said | {"metadata": said["metadata"] | {"hook_name": name}}))
    return harm


def weights_with(change):
    "A harm: tensors that are wrong."
    def harm(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    return harm


def halved(name):
    "A harm: a file of which half is there."
    def harm(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return harm


def written(name, text): return lambda folder: (folder / name).write_text(text)


def transposed(tensors): tensors["W_dec"] = tensors["W_dec"].T
def with_nan(tensors): tensors["W_enc"][0, :3] = torch.nan
def without_decoder(tensors): tensors.pop("W_dec")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n"
A_STREAM, NAN, INF = Node("resid_pre", 0), float("nan"), float("inf")
MODEL_FOLDER = EMBEDDED / "tiny-gpt2"

SOURCES = [
    ("an empty name", lambda f: load_saes(""), ValueError, "'' name nothing: give an embedded set (tiny-gemma"),
    ("a blank name", lambda f: load_saes("  "), ValueError, "name nothing: give an embedded set"),
    ("a misspelled name", lambda f: load_saes("tiny-gpt2-res-tok"), ValueError, "do you mean 'tiny-gpt2-res-topk'?"),
    ("a misspelled release", lambda f: load_saes("gpt2-smal-res-jb"), ValueError, "do you mean 'gpt2-small-res-jb'?"),
    ("a folder that is not there", lambda f: load_saes(f.folder() / "no"), ValueError, "nor a folder, nor a sae_lens"),
    ("an empty folder", lambda f: load_saes(f.folder()), ValueError, "holds no SAE: there is no cfg.json in it"),
    ("a folder of a model", lambda f: load_saes(MODEL_FOLDER), ValueError, "config.json is that of a language model"),
    ("a file", lambda f: load_saes(MODEL_FOLDER / "config.json"), ValueError, "are a file: give the folder that holds"),
    ("a number", lambda f: load_saes(3), TypeError, "given as int are neither a name, a folder nor an iterable"),
    ("a device that torch lacks", lambda f: load_saes("tiny-gpt2-res-topk", device="gpu"), ValueError,
     "device 'gpu' is none that torch knows"),
    ("nothing", lambda f: load_saes(None), TypeError, "given as NoneType are neither a name"),
    ("a model", lambda f: load_saes(f.model), TypeError, "given as TransformerBridge are neither a name"),
    ("a task's prompts", lambda f: load_saes(f.prompts), TypeError, "given as SimpleNamespace are neither a name"),
    ("a list of names", lambda f: load_saes(["tiny-gpt2-res-topk", "tiny-gpt2-z-topk"]), TypeError,
     "SAE number 0 is 'tiny-gpt2-res-topk', which names a whole set"),
    ("a list of sets", lambda f: load_saes([f.saes]), TypeError, "which names a whole set"),
    ("a name at a node", lambda f: load_saes({"L0.resid_pre": "mine"}), TypeError, "SAE L0.resid_pre is 'mine'"),
    ("an empty list", lambda f: load_saes([]), ValueError, "no SAEs in the iterable: give at least one"),
    ("an empty mapping", lambda f: load_saes({}), ValueError, "no SAEs in the iterable: give at least one"),
    ("objects that are no SAEs", lambda f: load_saes([3]), TypeError, "SAE 'int' (int) needs `encode`"),
    ("weights by name", lambda f: load_saes({"W_dec": torch.eye(3)}), ValueError,
     "node 'W_dec' is not of the form L9H6"),
    ("a layer as a key", lambda f: load_saes({0: Own()}), TypeError, "node 0 is neither a Node nor a text such as"),
    ("an unknown site", lambda f: load_saes({"L9.foo": Own()}), ValueError, "no SAE can stand at L9.foo: site 'foo'"),
    ("an unknown hook", lambda f: load_saes({"blocks.1.hook_foo": Own()}), ValueError,
     "hook 'blocks.1.hook_foo' is not"),
    ("a head of the stream", lambda f: load_saes({"L1H2.resid_pre": Own()}), ValueError, "resid_pre has no heads"),
    ("a negative layer", lambda f: load_saes({Node("z", -1): Own()}), ValueError, "are counted from 0"),
    ("two at one place", lambda f: load_saes([Own(), Own()]), ValueError, "two SAEs at L1.resid_pre, number 0 and"),
    ("one place named twice", lambda f: load_saes({"L1.resid_pre": Own(), "L0.resid_post": Own()}), ValueError,
     "two SAEs for the same place, L1.resid_pre and L0.resid_post: leave one out"),
    ("ids that match nothing", lambda f: load_saes("tiny-gpt2-res-topk", ids="*.7.*"), ValueError,
     "ids='*.7.*' is none of the SAEs of folder"),
    ("ids that are no pattern", lambda f: load_saes("tiny-gpt2-res-topk", ids=[1]), TypeError,
     "ids=[1] is not a pattern"),
    ("ids of objects", lambda f: load_saes([Own()], ids="*2*"), ValueError, "ids='*2*' chooses among the SAEs of a"),
    ("ids of a set", lambda f: load_saes(f.saes, ids="*2*"), ValueError, "of objects, give those you mean"),
    ("a type that is none", lambda f: load_saes("tiny-gpt2-res-topk", dtype="float7"), ValueError, "dtype 'float7' is"),
    ("a device that is not there", lambda f: load_saes("tiny-gpt2-res-topk", device="meta:0"), ValueError,
     "device 'meta:0'"),
    ("whole numbers", lambda f: load_saes("tiny-gpt2-res-topk", dtype=torch.int8), ValueError,
     "dtype torch.int8 is not"),
    ("another type for a set", lambda f: load_saes(f.saes, dtype="float16"), ValueError, "keeps its dtype and device"),
    ("another type for own", lambda f: load_saes([Own()], dtype="float16"), ValueError,
     "Own is taken as it is: convert"),
    ("an empty set name", lambda f: load_saes("tiny-gpt2-z-topk", name=""), ValueError, "'' is not a line of text"),
    ("a set name of two lines", lambda f: load_saes([Own()], "a\nb"), ValueError, "'a\\nb' is not a line of text"),
    ("a number as set name", lambda f: load_saes([Own()], 3), ValueError, "SAE set name 3 is not a line of text"),
]

FILES = [
    ("no cfg.json beside others", lambda f: two_folders(f, lambda p: (p / CFG).unlink()), ValueError,
     "blocks.2.hook_resid_pre' has no cfg.json: copy it there"),
    ("no weights beside others", lambda f: two_folders(f, lambda p: (p / WEIGHTS).unlink()), ValueError,
     "blocks.2.hook_resid_pre' has no sae_weights.safetensors"),
    ("half a weights file", lambda f: two_folders(f, halved(WEIGHTS)), ValueError,
     "sae_weights.safetensors' are damaged or half-downloaded, get them again"),
    ("half a header", lambda f: two_folders(f, lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:40])),
     ValueError, "are damaged or half-downloaded, get them again"),
    ("a header of noise", lambda f: two_folders(f, lambda p: (p / WEIGHTS).write_bytes(b"\x03" + bytes(7) + b"abcde")),
     ValueError, "sae_weights.safetensors' is damaged or half-downloaded, get it again"),
    ("an empty weights file", lambda f: two_folders(f, written(WEIGHTS, "")), ValueError,
     "sae_weights.safetensors' is empty: copy or download it again"),
    ("a pointer of Git LFS", lambda f: two_folders(f, written(WEIGHTS, POINTER)), ValueError,
     "sae_weights.safetensors' is a pointer of Git LFS, not the file: run `git lfs pull`"),
    ("a web page", lambda f: two_folders(f, written(WEIGHTS, "\n<!DOCTYPE html>")), ValueError,
     "is a web page: download"),
    ("a web page as cfg", lambda f: two_folders(f, written(CFG, "<html>404")), ValueError, "cfg.json' is a web page"),
    ("half a cfg.json", lambda f: two_folders(f, halved(CFG)), ValueError,
     "cfg.json' is damaged or half-downloaded, get it again"),
    ("a list as cfg.json", lambda f: two_folders(f, written(CFG, "[1]")), ValueError,
     "says a list where it must say an"),
    ("no d_sae", lambda f: two_folders(f, cfg_with(d_sae=None)), ValueError, "cfg.json' does not say 'd_sae'"),
    ("no architecture", lambda f: two_folders(f, cfg_with(architecture=None)), ValueError,
     "cfg.json' says architecture None, which sae_lens does not know (has "),
    ("an unknown architecture", lambda f: two_folders(f, cfg_with(architecture="foo")), ValueError,
     "cfg.json' says architecture 'foo', which sae_lens does not know (has "),
    ("no hook name", lambda f: two_folders(f, hooked_at(None)), ValueError, "does not say where it stands: give it"),
    ("an unknown hook name", lambda f: two_folders(f, hooked_at("model.3")), ValueError,
     "hook 'model.3' is not one of an SAE that can be used here"),
    ("another width", lambda f: two_folders(f, cfg_with(d_in=64)), ValueError,
     "W_dec of shape (512, 128), and by its cfg"),
    ("a transposed decoder", lambda f: two_folders(f, weights_with(transposed)), ValueError,
     "have W_dec of shape (128, 512), and by its cfg.json it is (512, 128)"),
    ("no decoder", lambda f: two_folders(f, weights_with(without_decoder)), ValueError, "have W_dec of shape None"),
    ("nan in a file", lambda f: two_folders(f, weights_with(with_nan)), ValueError,
     "at L2.resid_pre' has 3 of 65536 numbers in W_enc that are nan or infinite"),
    ("a negative k", lambda f: two_folders(f, cfg_with(k=-4)), ValueError, "keeps k=-4 of its 512 latents: k must be"),
    ("a file for a folder", lambda f: check_files(MODEL_FOLDER / "config.json"), ValueError,
     "has no cfg.json: copy it"),
]

LENS = [
    ("nan in W_enc", lambda f: load_saes([altered(f, "W_enc", (0, 0), NAN)]), ValueError, "1 of 1536 numbers in W_enc"),
    ("inf in W_dec", lambda f: load_saes([altered(f, "W_dec", (0, 0), INF)]), ValueError, "1 of 1536 numbers in W_dec"),
    ("nan in b_enc", lambda f: from_sae_lens(altered(f, "b_enc", 3, NAN), "mine"), ValueError,
     "SAE 'mine at L2.resid_pre' has 1 of 96 numbers in b_enc"),
    ("all biases -inf", lambda f: load_saes([altered(f, "b_enc", slice(None), -INF)]), ValueError,
     "is dead: b_enc is -inf"),
    ("all thresholds inf", lambda f: load_saes([altered(f, "threshold", slice(None), INF, "jumprelu")]), ValueError,
     "is dead: threshold is inf for all 96 latents"),
    ("k of 0", lambda f: from_sae_lens(random_sae_lens("topk", k=0)), ValueError, "keeps k=0 of its 96 latents"),
    ("k above d_sae", lambda f: from_sae_lens(random_sae_lens("topk", k=97)), ValueError, "k must be in 1 … 96"),
    ("no SAE of sae_lens", lambda f: from_sae_lens(Own()), TypeError,
     "SAE 'sae' (Own) is not one of sae_lens: give it to"),
    ("an unknown site", lambda f: from_sae_lens(f.topk, node="L1.foo"), ValueError, "no SAE can stand at L1.foo"),
    ("a wrong hook", lambda f: node_of_hook("resid_pre"), ValueError, "hook 'resid_pre' is not one of an SAE"),
    ("an unknown architecture", lambda f: random_sae_lens("foo"), ValueError, "'foo' is not one of standard, gated"),
    ("no hook", lambda f: node_of_hook(None), ValueError, "hook None is not one of an SAE that can be used here"),
    ("a type that is none", lambda f: as_dtype("float"), ValueError,
     "dtype 'float' is not one that weights are kept in"),
]

OWN = [
    ("no encode", lambda f: load_saes([own(encode=None)]), TypeError, "(Own) needs `encode`, and `decode` or `W_dec`"),
    ("encode that is no function", lambda f: load_saes([own(encode=3)]), TypeError, "(Own) needs `encode`"),
    ("no place", lambda f: load_saes([own(hook_name=None)]), ValueError, "does not say where it stands: give it"),
    ("a wrong place", lambda f: load_saes([own(hook_name="layer 3")]), ValueError,
     "hook 'layer 3' is not one of an SAE"),
    ("no width", lambda f: load_saes([own(d_in=None, W_dec=None)]), ValueError,
     "does not say how wide the activations"),
    ("a width of text", lambda f: load_saes([own(d_in="4")]), ValueError, "d_in='4': give it an attribute `d_in`"),
    ("a wrong width", lambda f: load_saes([own(d_in=7)]), ValueError, "fails to encode a tensor of shape (6, 7)"),
    ("encode gives a pair", lambda f: load_saes([own(encode=lambda s, x: (x, x))]), TypeError, "'Own' returns tuple"),
    ("encode gives an array", lambda f: load_saes([own(encode=lambda s, x: x.numpy())]), TypeError, "returns ndarray"),
    ("encode sums up", lambda f: load_saes([own(encode=lambda s, x: x.sum(1))]), ValueError,
     "returns shape (6,) for 6"),
    ("encode gives nan", lambda f: load_saes([own(encode=lambda s, x: x @ s.W_dec.T / 0)]), ValueError,
     "in its codes of"),
    ("encode fails", lambda f: load_saes([own(encode=lambda s, x: x @ torch.eye(9))]), ValueError,
     "fails to encode a tensor"),
    ("decode gives a pair", lambda f: load_saes([own(decode=lambda s, c: (c, c))]), ValueError,
     "decodes 6 tokens to tuple"),
    ("decode of another width", lambda f: load_saes([own(decode=lambda s, c: c)]), ValueError, "6 tokens to (6, 8)"),
    ("decode fails", lambda f: load_saes([own(decode=lambda s, c: c @ torch.eye(3))]), ValueError, "fails to decode"),
    ("a transposed matrix", lambda f: load_saes([own(decode=None, W_dec=torch.randn(4, 8),
                                                     encode=lambda s, x: x @ s.W_dec)]), ValueError, "give W_dec.T"),
    ("a matrix that is none", lambda f: load_saes([own(decode=None, W_dec=[[1.0]], encode=lambda s, x: x)]), TypeError,
     "W_dec of SAE 'Own' is list: give a tensor"),
    ("an unknown site", lambda f: from_object(Own(), "L2.foo"), ValueError, "no SAE can stand at L2.foo"),
]

VIEWS = [
    ("a transposed W_dec", lambda f: replace(f.toy, W_dec=torch.zeros(4, 9)), ValueError, "W_dec looks transposed"),
    ("a W_dec of one axis", lambda f: replace(f.toy, W_dec=torch.zeros(4)), ValueError, "has shape (4,): give (d_sae"),
    ("no latents", lambda f: replace(f.toy, W_dec=torch.zeros(0, 4)), ValueError,
     "has shape (0, 4): give (d_sae, d_in)"),
    ("a list as W_dec", lambda f: replace(f.toy, W_dec=[[1.0]]), TypeError,
     "W_dec of SAE 'toy' is list: give a tensor"),
    ("whole numbers as W_dec", lambda f: replace(f.toy, W_dec=torch.eye(4).long()), TypeError, "'toy' is torch.int64"),
    ("a b_dec of another width", lambda f: replace(f.toy, b_dec=torch.zeros(5)), ValueError,
     "must have the same width"),
    ("nan in W_dec", lambda f: replace(f.toy, W_dec=NAN * torch.eye(4)), ValueError,
     "'toy at L0.resid_pre' has 16 of 16"),
    ("inf in b_dec", lambda f: replace(f.toy, b_dec=torch.ones(4) / 0), ValueError, "4 of 4 numbers in b_dec"),
    ("a number as a name", lambda f: replace(f.toy, name=3), TypeError, "SAE name 3 is no text"),
    ("no encoder", lambda f: replace(f.toy, encoder=None), TypeError,
     "encoder of SAE 'toy' is NoneType: give a function"),
    ("an unknown normalisation", lambda f: replace(f.toy, normalise="l2"), ValueError,
     "'l2' of SAE 'toy' is not one of"),
    ("an unknown site", lambda f: replace(f.toy, node="L0.foo"), ValueError, "site 'foo' is not known (has resid_pre"),
    ("activations of another width", lambda f: f.toy.encode(f.x), ValueError, "takes activations of width 4, got 128"),
    ("a single number", lambda f: f.toy.encode(torch.tensor(1.0)), ValueError, "width 4, got a single number"),
    ("an array", lambda f: f.toy.encode(f.x.numpy()), TypeError, "takes activations as a tensor, got ndarray: convert"),
    ("activations of nan", lambda f: f.toy.encode(NAN * f.x[:, :4]), ValueError,
     "so are the activations that it was given"),
    ("a norm of 0", lambda f: replace(f.toy, normalise="constant_norm_rescale").encode(torch.zeros(2, 4)), ValueError,
     "gives latents that are nan or infinite: look at its weights"),
    ("a negative chunk", lambda f: f.toy.encode(f.x[:, :4], chunk=-1), ValueError, "chunk=-1 tokens at a time is less"),
    ("a chunk of 0", lambda f: f.toy.encode(f.x[:, :4], chunk=0), ValueError,
     "chunk=0 tokens at a time is less than 1"),
    ("an encoder of pairs", lambda f: replace(f.toy, encoder=lambda x: (x, x)).encode(f.x[:, :4]), TypeError,
     "the encoder of SAE 'toy' returns tuple"),
    ("too few latents", lambda f: replace(f.toy, encoder=lambda x: x[:, :3]).encode(f.x[:, :4]), ValueError,
     "returns shape (40, 3) for 40 tokens: it must return (token, latent), 40 × 4"),
    ("codes of latents that are not there", lambda f: replace(f.toy, encoder=lambda x: Codes(
        torch.full((len(x), 1), 7), x[:, :1])).encode(f.x[:, :4]), ValueError, "names latent 7, and has 4"),
    ("dense codes", lambda f: f.toy.decode(f.x[:, :4]), TypeError, "SAE 'toy' decodes `Codes`, as `encode` gives them"),
    ("one number as codes", lambda f: to_codes(torch.tensor(1.0)), ValueError, "one number per latent"),
    ("an unknown normalisation of activations", lambda f: normalised(f.x, "l2"), ValueError,
     "normalisation 'l2' is not"),
    ("a negative k", lambda f: BlockEncoder(f.toy.encoder, 4, k=-1), ValueError,
     "k=-1 is not a whole number of latents"),
    ("a half k", lambda f: BlockEncoder(f.toy.encoder, 4, k=1.5), ValueError, "k=1.5 is not a whole number of latents"),
    ("no latents in blocks", lambda f: BlockEncoder(f.toy.encoder, 0), ValueError, "d_sae=0 is not a whole number"),
    ("no steps", lambda f: Pursuit(torch.eye(4), 0), ValueError, "steps=0 is not a whole number of latents"),
]


def moved(f, node): return load_saes({node: f.sae})


SETS = [
    ("an empty set", lambda f: SAESet("none", {}), ValueError, "SAE set 'none' is empty: give at least one SAE"),
    ("a list", lambda f: SAESet("list", [f.toy]), TypeError,
     "'list' needs SparseSAEs by node: make sets of other objects"),
    ("objects of another kind", lambda f: SAESet("own", {A_STREAM: Own()}), TypeError,
     "'own' needs SparseSAEs by node"),
    ("an SAE elsewhere", lambda f: SAESet("moved", {"L1.z": f.toy}), ValueError,
     "has at L1.z an SAE that stands at L0"),
    ("an unknown site asked for", lambda f: f.saes.find("L2.foo"), ValueError, "no SAE can stand at L2.foo"),
    ("a node that is none", lambda f: f.saes.find(2), TypeError, "node 2 is neither a Node nor a text"),
    ("a layer that is not there", lambda f: f.saes.before(7), ValueError, "before layer 7 (has L0.resid_pre"),
    ("a layer of text", lambda f: f.saes.before("2"), ValueError, "before layer '2' (has L0.resid_pre"),
    ("a layer before the first", lambda f: f.saes.before(-1), ValueError, "before layer -1 (has L0.resid_pre"),
    ("a layer of another model", lambda f: moved(f, "L99.resid_pre").require(f.model), ValueError, "has 4 layers: is"),
    ("a head of another model", lambda f: moved(f, "L1H7.q").require(f.model), ValueError,
     "has 4 heads there: is another"),
    ("a width of another model", lambda f: SAESet("toy", {A_STREAM: f.toy}).require(f.model), ValueError,
     "SAE set 'toy' has an SAE at L0.resid_pre, and the model has activations of width 128 there, not 4"),
    ("a whole site's width at a head", lambda f: moved(f, "L1H1.z").require(f.model), ValueError,
     "of width 32 there, not"),
    ("no model", lambda f: f.saes.require("tiny-gpt2"), TypeError, "str is no TransformerLens model: load one with"),
    ("a name for a set", lambda f: node_shares("L1H1.q@END", "tiny-gpt2-res-topk"), TypeError,
     "type str are no SAESet"),
    ("no position", lambda f: sources("L1H1.q", f.saes), ValueError, "node L1H1.q cannot be projected to: it must be"),
    ("no head", lambda f: route_taken("L1.q@END", f.saes), ValueError, "it must be one head of q, k, v or z"),
    ("a node of another form", lambda f: route_taken("q@END", f.saes), ValueError, "node 'q@END' is not of the form"),
    ("an unknown route", lambda f: sources("L1H1.z@END", f.saes, "back"), ValueError,
     "'back' is not one of read, write"),
]

BASELINES = [
    ("no components", lambda f: pca_sae(f.x, 0, f.place), ValueError, "k=0 components are not in 1 … 128"),
    ("too many components", lambda f: pca_sae(f.x, 129, f.place), ValueError, "k=129 components are not in 1 … 128"),
    ("half a component", lambda f: pca_sae(f.x, 2.5, f.place), ValueError, "k=2.5 components are not in 1 … 128"),
    ("a single token", lambda f: pca_sae(f.x[:1], 2, f.place), ValueError,
     "2 tokens or more, (token, d_in), not of shape"),
    ("prompts of tokens", lambda f: pca_sae(f.x[None], 2, f.place), ValueError,
     "(token, d_in), not of shape (1, 40, 128)"),
    ("activations of nan", lambda f: pca_sae(NAN * f.x, 2, f.place), ValueError,
     "PCA is made of activations that are nan"),
    ("an unknown site", lambda f: pca_sae(f.x, 2, "L3.foo"), ValueError, "no SAE can stand at L3.foo"),
    ("no width", lambda f: identity_sae(0, f.place), ValueError, "d_in=0 is no width of activations: give 1 or more"),
    ("no tokens", lambda f: random_decoder(f.sae, f.x[:0]), ValueError,
     "the random decoder beside SAE 'tiny-gpt2-res-topk'"),
    ("another width", lambda f: random_decoder(f.sae, f.x[:, :64]), ValueError, "activations of width 128, got 64"),
    ("a seed of text", lambda f: random_decoder(f.sae, f.x, seed="a"), TypeError, "seed='a' is no whole number"),
    ("a set", lambda f: random_decoder(f.saes, f.x), TypeError, "SAESet is no SparseSAE: give one SAE at a time"),
    ("no dictionary", lambda f: supervised_as_sae({}, f.place), TypeError, "dict is no dictionary of one node"),
]
ROWS = [*SOURCES, *FILES, *LENS, *OWN, *VIEWS, *SETS, *BASELINES]  # what, call, error, part of its text


@pytest.mark.parametrize("what,call,error,text", ROWS, ids=[row[0] for row in ROWS])
def test_wrong_calls_are_refused(what, call, error, text, fixtures):
    with pytest.raises(error) as caught: call(fixtures)
    assert text in str(caught.value)


def test_an_unharmed_folder_is_read(fixtures):
    assert len(two_folders(fixtures, lambda folder: None)) == 2
    load_saes([own()])
    fixtures.saes.require(fixtures.model)
