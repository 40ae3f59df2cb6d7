"""Results of sweeps that never were: cells with evidence of known quality, as many as are asked for."""
import os
import random
from dataclasses import replace

import torch

from sage_nb.lab.cells import SKYLINE, Cell, CellKey, write_cell
from sage_nb.measures.faithfulness import SparseRuns
from sage_nb.measures.score import Answers, Evidence, sage_score


def made_up(quality, seed, hard=0, n=40):
    "Evidence on an SAE that recovers so much of each prompt's metric, give or take."
    noise = [torch.randn(n, 1, generator=torch.Generator().manual_seed(s)) for s in (hard, seed)]
    clean, ablated = torch.full((n,), 3.0), torch.zeros(n)

    def answers(kept): return Answers(SparseRuns(clean, ablated, kept.expand(n, 3), 3 - kept.expand(n, 3)))
    own = answers(3 * quality + 0.6 * noise[0] + 0.4 * noise[1])
    return [Evidence("IO:z@END", own, answers(torch.full((n, 1), 3.0)))]


def row_of(name, kind, score, lo, hi):
    "A row of a cell."
    row = {"sae": name, "kind": kind, "score": score, "score_lo": lo, "score_hi": hi}
    for part in ("faithfulness", "control", "coverage"): row |= {part: score, f"{part}_lo": lo, f"{part}_hi": hi}
    return row


def key_of(sae, task="ioi", seed=0, model="tiny", **other):
    return CellKey(**dict(
        model=model, model_hash=f"hash of {model}", revision=None, flags={"prepend_bos": True}, dtype="torch.float32",
        task=task, task_hash=f"{model}, {task}, {seed}", n=80, seed=seed, sae=sae, sae_hash=f"hash of {sae}",
        settings={"n": 80, "tests": [1, 2, 3]}, score_version=2, version="0.1.0") | other)


def cell_of(key, score, lo, hi, l0=8.0, truth=None):
    "A finished cell, as large as a real one."
    plain = [row_of(f"{key.sae}, random twin", "twin", 0.2, 0.1, 0.3), row_of("mean ablation", "floor", 0.0, 0.0, 0.0),
             *(row_of(f"PCA-{k}", "PCA", 0.3, 0.2, 0.4) for k in (4, 8, 16)),
             row_of("identity", "identity", 0.3, 0.2, 0.4), row_of(SKYLINE, "skyline", 1.0, 1.0, 1.0)]
    settings = {"model": {"name": key.model, "hash": key.model_hash, "dtype": key.dtype},
                "task": {"name": key.task, "hash": key.task_hash}, "score_version": key.score_version,
                "certificate": {"option": 1}, "projection": {"option": 1}, "tests": key.settings["tests"],
                "sections": "s", "dictionaries": {"label": "mse", "hash": truth or f"truth of {key.task_hash}"},
                "discovery": {f"option {i}": i for i in range(40)},
                "versions": {f"package {i}": "1.0" for i in range(8)}}
    return Cell(key, methods=(row_of(key.sae, "sae", score, lo, hi), *plain),
                margin={"value": score - 0.3, "over": "PCA-8"},
                fit="good", about={"l0": l0, "d_sae": 512, "d_in": 128, "architecture": "topk", "hash": key.sae_hash,
                                   "loss recovered": 0.9, "places": ["L0.resid_pre"]},
                sections=({"section": "IO:z@END", "weight": 1.0, "measure": None},),
                cost={"passes": 40.0, "seconds": 2.5}, settings=settings, notes=("a note of some length",) * 6)


def write_one(folder, sae, quality, task="ioi", seed=0, model="tiny", l0=8.0, truth=None, **other):
    "Write a cell with its evidence."
    key = key_of(sae, task, seed, model, **other)
    own_seed, hard = (random.Random(words).randrange(2**31) for words in (f"{sae}{task}{seed}", f"{task}{seed}"))
    own = made_up(quality, own_seed, hard)
    score = sage_score(own)
    cell = cell_of(key, score.value, score.lo, score.hi, l0, truth)
    return write_cell(folder, cell, {sae: own, SKYLINE: [replace(e, own=e.planted) for e in own]})


def write_many(folder, n, n_tasks=3, monkey=os):
    "Write so many cells without evidence, fast: nothing is flushed to the disk."
    rng, fsync, monkey.fsync = random.Random(0), os.fsync, lambda file: None
    try:
        for i in range(n):
            key = key_of(f"release/layer_{i // n_tasks % 26}/width_{i // n_tasks // 26}", f"task {i % n_tasks}")
            score = rng.random()
            lo, hi = max(0, score - 0.05), min(1, score + 0.05)
            write_cell(folder, cell_of(key, score, lo, hi, l0=4 + 200 * rng.random()))
    finally: monkey.fsync = fsync
