"""What an evaluation costs: processor seconds in forward passes, encoding, decomposition and the rest, and memory.

The case: a model of GPT-2 small's shape with random weights, a cross-section of three heads at z@END made by hand, 192
prompts of IOI, and an SAE of 24,576 latents, 50 of them active, before each layer, with its random twin, PCA, the
identity and the planted dictionary beside it. A pass is one forward pass of the held-out prompts, so 15 passes of
encoding is what the model takes for 15 runs on them. Encoding is all that makes codes of activations, for whatever
candidate; decomposition is what makes contributions at the nodes of codes. Seconds are of the processor and of one
thread, each in a process of its own, whose largest resident size is the memory; what loads the libraries is left out.

With --curve, the embedded tiny-gpt2 instead, and one thing varied at a time: latents, prompts, SAE sets, sections. The
last column is by what power of that thing the seconds grow from one row to the next: 1 is linear.

python benchmarks/cost.py [--quick | --curve] [--explorers] [--set latents prompts saes sections]
"""
import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import wraps

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from sage_nb.core.activations import Node, count_passes
from sage_nb.core.intervals import Estimate
from sage_nb.core.models import load_model
from sage_nb.discovery.sections import CrossSection, CrossSections
from sage_nb.lab.zoo import build_tokenizer
from sage_nb.measures import edits, units
from sage_nb.measures.certificate import Criteria
from sage_nb.report.evaluation import evaluate
from sage_nb.saes import baselines
from sage_nb.saes.codes import BlockEncoder, SparseSAE
from sage_nb.saes.sets import SAESet
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import fit_dictionaries

PARTS = ("forwards", "encoding", "decomposition", "the rest")
LAX = Criteria(min_r2=-math.inf, tolerance=math.inf, max_off_target=1.0)  # whatever the numbers are, they cost as much
CASE = {"model": "gpt2", "latents": 24_576, "active": 50, "prompts": 192, "sets": 1, "explorers": False,
        "sections": ["IO: L9H9.z@END L9H6.z@END L10H0.z@END"]}
SMALL = CASE | {"model": "gpt2 of 3 layers", "latents": 2048, "prompts": 96,
                "sections": ["IO: L1H9.z@END L1H6.z@END L2H0.z@END"]}
TINY = {"model": "tiny-gpt2", "latents": 4096, "active": 16, "prompts": 128, "sets": 1, "explorers": False,
        "sections": ["number: L2H1.z@END L2H3.z@END L2H2.z@END"]}
MORE = ["number: L3H2.k@N L2H2.k@N", "number: L2H0.q@END L2H1.q@END", "number: L2H1.v@N L2H3.v@N",
        "number: L3H0.z@END L3H1.z@END", "number: L1H2.k@N L1H0.k@N", "number: L1H0.v@N L1H2.v@N",
        "number: L3H2.q@END L3H0.q@END"]
CURVES = {"latents": [2**n for n in (12, 14, 16, 18, 20)], "prompts": [2**n for n in (7, 8, 9, 10, 11, 12)],
          "sets": [1, 2, 4, 8], "sections": [1, 2, 4, 8]}


class Clock(dict):
    "Processor seconds by part; what one part takes inside another is not counted twice."

    def __init__(self):
        super().__init__(dict.fromkeys(PARTS, 0.0))
        self.open, self.since = ["the rest"], time.process_time()

    def _switch(self):
        now = time.process_time()
        self[self.open[-1]] += now - self.since
        self.since = now

    @contextmanager
    def part(self, name):
        self._switch()
        self.open.append(name)
        try: yield
        finally:
            self._switch()
            self.open.pop()

    def watch(self, owner, function: str, name: str):
        "Count the time of a function as that of a part."
        inner = getattr(owner, function)

        @wraps(inner)
        def timed(*args, **kwargs):
            with self.part(name): return inner(*args, **kwargs)
        setattr(owner, function, timed)


@torch.no_grad()
def plant(hf, nodes):
    "Let some heads look at all tokens alike, and what they see count against a word: who is named twice is out."
    hf.transformer.wte.weight.mul_(20)  # words outweigh the rest
    for node in nodes:
        attention = hf.transformer.h[node.layer].attn
        query, key, value = (slice(start + 64 * node.head, start + 64 * node.head + 64) for start in (0, 768, 1536))
        attention.c_attn.weight[:, query], attention.c_attn.weight[:, key] = 0, 0
        attention.c_attn.weight[:, value] = torch.eye(768)[:, query]
        attention.c_proj.weight[query] = -20 * torch.eye(768)[query]


def gpt2(layers, nodes):
    "GPT-2 small with random weights but for a planted circuit, as TransformerLens sees it."
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=layers))
    plant(hf, nodes)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        build_tokenizer(2000).save_pretrained(folder)
        return load_model(folder)


def model_of(name, sections):
    if not name.startswith("gpt2"): return load_model(name)
    return gpt2(int(name.split()[2]) if " of " in name else 12, [node for s in sections for node in s.nodes])


def random_sae(node, width, d_sae, active, seed):
    "A TopK SAE in random directions."
    W = torch.randn(d_sae, width, generator=torch.Generator().manual_seed(seed))
    W = W / W.norm(dim=-1, keepdim=True)
    return SparseSAE(node, W, torch.zeros(width), BlockEncoder(lambda x, part: (x @ W[part].T).relu(), d_sae, active))


def saes_of(case, model, sections):
    "As many sets as asked for, each with an SAE before every layer that is needed."
    layers = sorted({node.layer for section in sections for node in section.nodes})
    def at(layer, i): return random_sae(Node("resid_pre", layer), model.cfg.d_model, case["latents"], case["active"], i)
    return [SAESet(f"set {i}", {(sae := at(layer, i)).node: sae for layer in layers}) for i in range(case["sets"])]


def section_of(text):
    "A cross-section made by hand: what it carries, and its nodes."
    attribute, nodes = text.split(": ")
    nodes, none = tuple(map(Node.parse, nodes.split())), Estimate(0.0, 0.0, 0.0, 1)
    first, scores = nodes[0], (0.0,) * len(nodes)
    return CrossSection(attribute, first.site, first.position, nodes, scores, {len(nodes): none}, none)


def sections_of(case):
    sections = tuple(map(section_of, case["sections"]))
    return CrossSections(sections, pd.DataFrame(), {section.attribute: None for section in sections}, {})


def seconds_of_a_pass(model, prompts, batch_size=64):
    "What one forward pass of some prompts takes, the shortest of three."
    with torch.no_grad():
        times = []
        for _ in range(3):
            start = time.process_time()
            for rows in prompts.slices(batch_size): model(prompts.tokens[rows])
            times.append(time.process_time() - start)
    return min(times)


def measure(case):
    "One row."
    torch.set_num_threads(1)
    sections = sections_of(case)
    model = model_of(case["model"], sections)
    task = load_task("ioi" if case["model"].startswith("gpt2") else "agreement", model, n=case["prompts"])
    truth, saes = fit_dictionaries(model, task, sections), saes_of(case, model, sections)
    one, clock = seconds_of_a_pass(model, task.test.prompts), Clock()
    clock.watch(type(model), "forward", "forwards")
    clock.watch(SparseSAE, "encode", "encoding")
    for room in (units, edits): clock.watch(room, "decompose", "decomposition")
    with count_passes(model, len(task.test)) as passes:
        report = evaluate(model, task, sections, truth, saes, criteria=LAX, force=True, progress=False,
                          explorers=case["explorers"])
    clock._switch()
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tokens = int(task.test.prompts.until_end().sum())
    return {"prompts": len(task), "held out": len(task.test), "tokens": tokens, "pass": one, **clock,
            "passes run": passes.forward, "GiB": gibibytes, "phases": report.settings["cost"]["passes"]}


def in_a_process(case):
    "A row by a process of its own."
    arguments = [sys.executable, __file__, "--case", json.dumps(case)]
    said = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def report(case):
    "The case by its parts."
    row = in_a_process(case)
    print(f"{case['model']}, {case['latents']:,} latents, {row['prompts']} prompts, {row['held out']} held out with "
          f"{row['tokens']:,} tokens, {len(case['sections'])} section")
    print(f"{'':16}{'CPU s':>9}{'passes of the held-out prompts':>34}")
    print(f"{'one pass':16}{row['pass']:9.2f}{1:34}")
    for part in PARTS: print(f"{part:16}{row[part]:9.1f}{row[part] / row['pass']:34.1f}")
    whole = sum(row[part] for part in PARTS)
    print(f"{'all':16}{whole:9.1f}{whole / row['pass']:34.1f}")
    print("passes of all prompts by phase: " + ", ".join(f"{name} {n}" for name, n in row["phases"].items()))
    print(f"{row['passes run']:.1f} passes were run; largest resident size {row['GiB']:.2f} GiB", flush=True)


def curve(what):
    "Cost against one thing."
    print(f"\n{what:>10}{'pass':>9}" + "".join(f"{part:>15}" for part in PARTS) + f"{'all':>9}{'GiB':>7}{'power':>7}")
    before = None
    for value in CURVES[what]:
        varied = [*TINY["sections"], *MORE][:value] if what == "sections" else value
        row = in_a_process(TINY | {what: varied})
        whole, value = sum(row[part] for part in PARTS), row.get(what, value)  # a task may have fewer prompts
        power = "" if before is None else f"{math.log(whole / before[1]) / math.log(value / before[0]):.2f}"
        print(f"{value:10,}{row['pass']:9.3f}" + "".join(f"{row[part]:15.1f}" for part in PARTS)
              + f"{whole:9.1f}{row['GiB']:7.2f}{power:>7}", flush=True)
        before = value, whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three layers, few latents: only to see that it runs")
    parser.add_argument("--curve", nargs="*", choices=CURVES, help="cost against these; by default all of them")
    parser.add_argument("--explorers", action="store_true", help="also what can be looked at")
    parser.add_argument("--case", type=json.loads, help="for the processes that it starts")
    asked = parser.parse_args()
    disable_progress_bar()
    if asked.case: print(json.dumps(measure(asked.case)))
    elif asked.curve is None: report((SMALL if asked.quick else CASE) | {"explorers": asked.explorers})
    else:
        for what in asked.curve or CURVES: curve(what)
