"""Seconds and memory of the whole pipeline at the shapes of GPT-2 small, Pythia-70M-deduped and Gemma-2-2B.

Each model has its true configuration but for the number of layers (two) and Gemma's words (2,000 of 256,000, whose
logits would outweigh all else on two cores; --words 256000 for all), and lies in a cache in the hub's layout, with an
SAE of the public release that is used with it, at its true width and in that release's file format: gpt2-small-res-jb
(24,576 latents, sae_lens), pythia-70m-deduped-res-sm (32,768, sae_lens), gemma-scope-2b-pt-res-canonical (16,384,
Gemma Scope's npz). Weights are random but for a planted circuit, and the SAEs are identities, so the last column must
be 1. Nothing is fetched. Each row is a process of its own: CPU seconds of each step, and its largest resident size.

python benchmarks/real_shapes.py [--quick] [--model NAME] [--prompts N] [--words N]
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

RELEASES = {
    "gpt2": ("gpt2-small-res-jb", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre", 24576),
    "EleutherAI/pythia-70m-deduped": ("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_post",
                                      "blocks.0.hook_resid_post", 32768),
    "google/gemma-2-2b": ("gemma-scope-2b-pt-res-canonical", "layer_0/width_16k/canonical",
                          "blocks.0.hook_resid_post", 16384)}


class Steps(dict):
    "CPU seconds of each step."

    @contextmanager
    def __call__(self, name):
        start = time.process_time()
        yield
        self[name] = round(time.process_time() - start, 1)


def prepare(cache, name, words):
    "Write the model and its SAE, in a process of its own: it does not count."
    from real_shapes import WIDTH, add_model, add_release, directions, identity_in
    release, label, hook, d_sae = RELEASES[name]
    add_model(cache, name, vocabulary=words)
    add_release(cache, release, label, hook, identity_in(directions(WIDTH[name], name == "gpt2"), d_sae))


def measure(name, prompts):
    "One row: what a user types, with the planted cross-section."
    import torch
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    steps = Steps()
    with steps("import"):
        from sage_nb import evaluate, find_cross_sections, fit_dictionaries, load_model, load_saes, load_task
        from sage_nb.measures.certificate import Criteria
    release, label, *_ = RELEASES[name]
    with steps("load SAEs"): saes = load_saes(release, ids=label)
    with steps("load model"): model = load_model(name, like=saes)
    task = load_task("ioi", model, n=prompts)
    with steps("discover"): sections = find_cross_sections(
        model, task, "IO", "v", steps=1, max_prompts=prompts // 4, verbose=False)
    with steps("dictionaries"): truth = fit_dictionaries(model, task, sections)
    with steps("evaluate"): report = evaluate(
        model, task, sections, truth, saes, tests=(1,), progress=False, criteria=Criteria(max_off_target=1.0))
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = report.table[(report.table.sae == saes.name) & (report.table.metric == "fraction recovered")]
    return {"model": name, **steps, "peak GiB": round(gibibytes, 2), "recovered": round(rows.value.mean(), 4)}


def one(name, prompts, words):
    "A row by processes of their own."
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "hub"
        cache.mkdir()
        env = os.environ | {"HF_HUB_CACHE": str(cache)}
        for step in ("prepare", "measure"):
            arguments = [sys.executable, __file__, "--step", step, "--model", name, "--prompts", str(prompts)]
            if words: arguments += ["--words", str(words)]
            said = subprocess.run(arguments, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few words, and no Gemma")
    parser.add_argument("--model", choices=RELEASES)
    parser.add_argument("--prompts", type=int, default=72)
    parser.add_argument("--words", type=int, help="size of the vocabulary; by default the true one")
    parser.add_argument("--step", choices=("prepare", "measure"), help="for the processes that it starts")
    asked = parser.parse_args()
    if asked.step == "prepare": return prepare(Path(os.environ["HF_HUB_CACHE"]), asked.model, asked.words)
    if asked.step == "measure": return print(json.dumps(measure(asked.model, asked.prompts)))
    names = [asked.model] if asked.model else list(RELEASES)[: 2 if asked.quick else 3]
    for name in names:
        words = 2000 if asked.quick or name == "google/gemma-2-2b" else None
        row = one(name, asked.prompts, asked.words or words)
        if name == names[0]: print(" | ".join(row))
        print(" | ".join(map(str, row.values())), flush=True)


if __name__ == "__main__": main()
