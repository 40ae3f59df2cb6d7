"""Sweeps: what is finished stays finished, whatever ends a run; and the numbers are those of an unbroken one."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from sage_nb.core.models import EMBEDDED, load_model
from sage_nb.lab import sweeps
from sage_nb.lab.cells import CellError, cell_path, cells_in, key_of, read_cell
from sage_nb.lab.sweeps import SweepOptions, ground_of_bytes, is_done, sweep, sweep_items
from sage_nb.saes.sets import load_saes
from sage_nb.tasks.task import load_task

FEW = SweepOptions(sites=("v",), attributes=("IO",), tests=(1, 3))
SETS = ["tiny-gpt2-res-topk", "tiny-gpt2-res-standard", "tiny-gpt2-res-topk-frozen-encoder"]
PROGRAM = """
import sys
from sage_nb.lab.sweeps import SweepOptions, sweep
few = SweepOptions(sites=("v",), attributes=("IO",), tests=(1, 3))
sweep("tiny-gpt2", "ioi", sys.argv[2:], sys.argv[1], n=64, options=few, progress=False)
"""


def swept(out, saes=SETS, **others):
    return sweep("tiny-gpt2", "ioi", saes, out, n=64, options=FEW, progress=False, **others)


def numbers(result):
    "All that must not depend on how a sweep went; evidence by the hash of its bytes."
    return {c.key.name: (c.status, c.methods, c.margin, c.sections, c.evidence) for c in result.cells}


def files_in(out): return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Each process computes on one thread: sums over several may differ in the last bit."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A sweep that nothing disturbed."
    return swept(tmp_path_factory.mktemp("unbroken"))


@pytest.fixture
def out(unbroken, tmp_path):
    "A copy of its folder."
    return shutil.copytree(unbroken.out, tmp_path / "results")


@pytest.fixture
def no_work(monkeypatch):
    def work(*args, **others): raise AssertionError("the work began before everything was checked")
    monkeypatch.setattr(sweeps, "find_ground", work)


def path_of(out, name):
    "The file of a set's cell."
    return next(cell_path(out, cell.key) for cell in cells_in(out).cells if cell.key.sae == name)


def test_a_sweep_that_is_done_does_nothing(unbroken, out, no_work):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = swept(out)
    assert (unbroken.made, again.made, again.status) == (3, 0, 0) and numbers(again) == numbers(unbroken)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path != out} == {
        path: was for path, was in before.items() if path != out}


def test_a_dry_run_tries_one_cell_and_writes_nothing(tmp_path, unbroken):
    plan = swept(tmp_path / "new", dry_run=True)
    assert (plan.to_do, plan.table.cells.tolist(), plan.basis) == (3, [3], {"tiny-gpt2": "by a trial"})
    assert plan.disk > 0 and plan.seconds > 0 and plan.memory > 2**20 and not (tmp_path / "new").exists()


def test_where_cells_are_there_a_dry_run_computes_nothing(unbroken, no_work):
    more = sweep("tiny-gpt2", "ioi", SETS, unbroken.out, seeds=[0, 1], n=64, options=FEW, dry_run=True)
    assert more.table.done.tolist() == [3, 0] and more.basis == {"tiny-gpt2": "by 3 cells"}
    took = [cell.cost["seconds"] for cell in unbroken.cells]
    shared = max(cell.cost["shared seconds"] for cell in unbroken.cells)
    assert more.seconds == pytest.approx(sum(took) + shared) and more.memory > 2**20


def test_what_cannot_be_tried_has_no_time(tmp_path):
    "No cross-section is found where noise is all there is, so nothing can be tried."
    options = replace(FEW, attributes=("Pos",), sites=("resid_post",))
    plan = sweep("tiny-gpt2", "ioi", "tiny-gpt2-res-topk", tmp_path / "new", n=32, options=options, dry_run=True)
    assert (plan.seconds, plan.memory) == (None, None)
    assert "time unknown (tiny-gpt2: ValueError: there is nothing to score SAEs on: " in str(plan)


# Ends of all kinds

def test_after_a_kill_the_rest_is_made_and_the_numbers_are_the_same(unbroken, tmp_path):
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), *SETS])
    try:
        while not list(tmp_path.glob("cells/*.json")):
            assert run.poll() is None, "it ended by itself"
            time.sleep(0.01)
    finally: run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    made = len([*tmp_path.glob("cells/*.json")])
    assert made < 3 and not cells_in(tmp_path).refused
    half = path_of(unbroken.out, SETS[0]).name
    (tmp_path / "cells" / f".{half}.{sweeps.socket.gethostname()}.{run.pid}.0badcafe.part").write_text("{")
    again = swept(tmp_path)
    assert again.made == 3 - made and numbers(again) == numbers(unbroken)
    assert files_in(tmp_path) == files_in(unbroken.out), "nothing half written is left"


def test_ctrl_c_keeps_what_is_finished(unbroken, out, monkeypatch):
    path_of(out, SETS[1]).unlink()
    path_of(out, SETS[2]).unlink()
    evaluate = sweeps.evaluate

    def stopped(model, task, sections, truth, saes, **others):
        if saes.name == SETS[2]: signal.raise_signal(signal.SIGINT)
        return evaluate(model, task, sections, truth, saes, **others)
    monkeypatch.setattr(sweeps, "evaluate", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught: swept(out)
    finally: signal.signal(signal.SIGINT, before)
    assert "1 of 2 cells were made and are kept" in caught.value.__notes__[0]
    assert [is_done(out, cell.key) for cell in unbroken.cells] == [True, True, False]


def test_a_full_disk_ends_the_sweep_and_loses_nothing(unbroken, out, monkeypatch):
    lost = path_of(out, SETS[1])
    lost.unlink()

    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def quick(*args, **others): raise RuntimeError("it would have taken long")
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "evaluate", quick)
        patch.setattr(sweeps, "write_cell", full)
        with pytest.raises(OSError, match="No space left") as caught: swept(out)
    assert "0 of 1 cells were made" in caught.value.__notes__[0] and not lost.exists()
    assert len(cells_in(out).cells) == 2


def test_too_little_room_is_seen_before(tmp_path, monkeypatch, no_work):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="0 MiB free: make room, or give another folder"): swept(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_to_is_seen_before(tmp_path, no_work):
    with pytest.raises(OSError): swept("/proc/self")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="name a folder"): swept(tmp_path / "file")


def test_a_cell_that_fails_is_recorded_and_the_sweep_goes_on(unbroken, out, monkeypatch):
    for name in SETS[:2]: path_of(out, name).unlink()
    evaluate = sweeps.evaluate

    def broken(model, task, sections, truth, saes, **others):
        if saes.name == SETS[0]: raise RuntimeError("the GPU is gone")
        return evaluate(model, task, sections, truth, saes, **others)
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "evaluate", broken)
        found = swept(out)
    assert (found.status, found.made, [c.status for c in found.cells]) == (3, 2, ["failed", "done", "done"])
    assert found.failed[0].error.startswith("RuntimeError: the GPU is gone (test_sweeps.py, line")
    assert "the same sweep again tries those that failed" in str(found) and "the GPU is gone" in str(found)
    record = json.loads(json.dumps(found.record()))
    assert record["failed"] == 1 and [row["status"] for row in record["cells"]] == ["failed", "done", "done"]
    again = swept(out)
    assert (again.status, again.made) == (0, 1) and numbers(again) == numbers(unbroken)


# Files that are not what they should be

def cut(path): path.write_bytes(path.read_bytes()[:-20])


def put_a_page(path): path.write_text("<html>404 Not Found</html>")


def change_a_number(path): path.write_text(path.read_text().replace('"score": 0.', '"score": 1.', 1))


def empty(path): path.write_bytes(b"")


def nest(path): path.write_text("[" * 100_000)


def put_a_number(path): path.write_text("12")


@pytest.mark.parametrize("damage", [cut, put_a_page, change_a_number, empty, nest, put_a_number])
def test_a_damaged_cell_is_not_taken_for_one(damage, unbroken, out):
    path = path_of(out, SETS[0])
    damage(path)
    with pytest.raises(CellError, match="run the sweep again"): read_cell(path)
    assert [is_done(out, cell.key) for cell in unbroken.cells] == [False, True, True]
    assert [*cells_in(out).refused] == [path.name]


def test_what_is_damaged_is_made_again(unbroken, out):
    "A cell that is cut, one in another's place, evidence with a changed bit, and a ground truth that is a web page."
    first, second, third = (path_of(out, name) for name in SETS)
    cut(first)
    shutil.copy(third, second)
    own = out / "evidence" / f"{read_cell(third).evidence[SETS[2]]}.safetensors"
    content = own.read_bytes()
    own.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ground = next((out / "shared").iterdir())
    put_a_page(ground)
    again = swept(out)
    assert again.made == 3 and numbers(again) == numbers(unbroken) and files_in(out) == files_in(unbroken.out)
    assert ground_of_bytes(ground.read_bytes()).truth.digest == ground_of_bytes(
        next((unbroken.out / "shared").iterdir()).read_bytes()).truth.digest


def test_a_lost_file_of_evidence_is_noticed(unbroken, out):
    cell = unbroken.cells[0]
    (out / "evidence" / f"{cell.evidence[SETS[0]]}.safetensors").unlink()
    assert [is_done(out, cell.key) for cell in unbroken.cells] == [False, True, True]


# Workers, and what a cell is named by

def test_two_workers_in_another_order_find_the_same_numbers(unbroken, tmp_path):
    found = swept(tmp_path, SETS[::-1], jobs=2)
    assert found.made == 3 and numbers(found) == numbers(unbroken)
    assert files_in(tmp_path) == files_in(unbroken.out)
    left = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert not [words for words in left if "popen_loky" in words], "workers hold memory"


def test_workers_need_names(model, tmp_path, no_work):
    with pytest.raises(ValueError, match="give them by name or folder"):
        sweep(model, "ioi", SETS, tmp_path, n=64, options=FEW, jobs=2, progress=False)
    with pytest.raises(ValueError, match="backend 'slurm' is not one of loky"): swept(tmp_path, backend="slurm")


def test_all_that_decides_numbers_is_in_the_name():
    def names(n=64, options=FEW, seeds=(0,)):
        return [item.key.name for item in sweep_items("tiny-gpt2", "ioi", SETS[0], seeds, n, options)]
    others = [names(n=65), names(seeds=[1]), names(options=SweepOptions(("v",), ("IO",), tests=(1,))),
              names(options=SweepOptions(("v", "z"), ("IO",), tests=(1, 3)))]
    assert names() == names() and len({*names(), *sum(others, [])}) == 5


# What may be given

@pytest.mark.parametrize("given", [
    dict(models=("tiny-gpt2",)), dict(models={"tiny-gpt2"}), dict(tasks=["ioi"]), dict(saes=iter([SETS[0]])),
    dict(saes=(SETS[0],)), dict(seeds=np.arange(1)), dict(seeds=pd.Series([0])), dict(seeds=range(1)), dict(seeds=0),
    dict(n=np.int64(64)),
    dict(options=SweepOptions("v", ["IO"], tests=[1, 3])), dict(options=SweepOptions(["v"], "IO", tests=(1, 3)))])
def test_the_same_may_be_said_in_several_ways(given):
    plain = dict(models="tiny-gpt2", tasks="ioi", saes=SETS[0], seeds=[0], n=64, options=FEW)
    assert [item.key for item in sweep_items(**plain | given)] == [item.key for item in sweep_items(**plain)]


@pytest.mark.parametrize("given, said", [
    (dict(models=[]), "there are no models"), (dict(tasks=()), "there are no tasks"),
    (dict(saes=[]), "there are no saes"),
    (dict(seeds=[]), "there are no seeds"), (dict(options={"sites": "v"}), "are no SweepOptions"),
    (dict(seeds=[0.5]), "seed=0.5 is not a whole number"), (dict(n="64"), "n='64' is not a whole number"),
    (dict(out=None), "out=None is not the name of a folder"), (dict(device="cuda"), "torch sees no such device"),
    (dict(device="gpu"), "none that torch knows"), (dict(device="gpu", jobs=2), "none that torch knows"),
    (dict(device="gpu", jobs=2, backend="dask"), "device 'gpu' is not one of cpu, cuda"),
    (dict(models=None), "model None is neither a name"), (dict(tasks=[3]), "task 3 is neither"),
    (dict(n=0), "n=0 is not a whole number of at least 2")])
def test_what_is_no_question_is_refused(given, said, tmp_path, no_work):
    if torch.cuda.is_available() and given.get("device") == "cuda": pytest.skip("there is a GPU")
    plain = dict(models="tiny-gpt2", tasks="ioi", saes=SETS[0], seeds=[0], n=64, options=FEW, out=tmp_path / "new")
    with pytest.raises((TypeError, ValueError), match=re.escape(said)): sweep(**plain | given, progress=False)
    assert not list(tmp_path.iterdir())


def test_models_and_tasks_may_be_objects(unbroken, tmp_path):
    model = load_model("tiny-gpt2")
    tasks = [load_task("ioi", model, n=64, seed=seed) for seed in (0, 5)]
    found = sweep(model, tasks, SETS[:2], tmp_path, options=FEW, progress=False, seeds=[7])
    assert [(c.key.sae, c.key.seed) for c in found.cells] == [(SETS[0], 0), (SETS[1], 0), (SETS[0], 5), (SETS[1], 5)]
    same = {cell.key.sae: cell.methods for cell in unbroken.cells}
    assert [cell.methods for cell in found.cells[:2]] == [same[SETS[0]], same[SETS[1]]]
    again = sweep(model, load_task("ioi", model, n=64), SETS[:2], tmp_path, options=FEW, progress=False)
    assert again.made == 0, "another object of the same task is the same task"


def test_numbers_of_numpy_name_the_same_cells():
    def names(seeds, n, tests):
        items = sweep_items("tiny-gpt2", "ioi", SETS[0], seeds, n, SweepOptions("v", "IO", tests=tests))
        return [item.key.name for item in items]
    assert names([1, 2], 64, (1, 3)) == names(np.arange(1, 3), np.int64(64), np.array([1, 3]))


# What changes under way

def test_a_folder_of_a_model_is_read_again_when_its_files_change(tmp_path):
    folder = shutil.copytree(EMBEDDED / "tiny-gpt2", tmp_path / "model")
    first = sweep_items(str(folder), "ioi", SETS[0], n=64, options=replace(FEW, force=True))[0].key
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.c_proj.weight"))
    save_file(weights | {name: weights[name] * 1.1}, folder / "model.safetensors", {"format": "pt"})
    again = sweep_items(str(folder), "ioi", SETS[0], n=64, options=replace(FEW, force=True))[0].key
    assert first.model_hash != again.model_hash


@pytest.mark.parametrize("what", ["model_hash", "task_hash"])
def test_a_cell_of_what_has_changed_fails_and_spoils_nothing(what, tmp_path):
    "What a worker loads must be what the sweep was asked for."
    item = sweep_items("tiny-gpt2", "ioi", SETS[0], n=64, options=FEW)[0]
    other = item._replace(key=replace(item.key, **{what: "0" * 16}))
    assert sweeps.make_cell(other, str(tmp_path)) == "failed"
    failed = read_cell(cell_path(tmp_path, other.key))
    assert f"the {what.removesuffix('_hash')} has changed since the sweep began: start it again" in failed.error
    assert not list(tmp_path.glob("shared/*")) and sweeps.make_cell(item, str(tmp_path)) == "done"


def test_saes_that_were_trained_on_are_other_saes(tmp_path):
    saes = load_saes(SETS[0])
    keys = []
    for _ in range(2):
        keys.append(sweep_items("tiny-gpt2", "ioi", saes, n=64, options=FEW)[0].key)
        for sae in saes: sae.W_dec.mul_(1.01)
    assert keys[0].sae_hash != keys[1].sae_hash


def test_rows_of_ones_own_have_no_seed():
    model = load_model("tiny-gpt2")
    task = load_task("ioi", model, n=64, seed=3)
    rows = replace(task, notes={name: x for name, x in task.notes.items() if name != "pool"})
    saes = load_saes(SETS[0])
    assert [key_of(model, some, saes).seed for some in (task, rows)] == [3, None]


# Several models, and GPUs

def test_of_several_models_each_is_loaded_once(monkeypatch):
    loaded, load = [], sweeps.load_model

    def noted(name, *args, **others):
        loaded.append(name)
        return load(name, *args, **others)
    monkeypatch.setattr(sweeps, "load_model", noted)
    sweeps._named_model.cache_clear()
    sets = ["tiny-gpt2-res-topk", "tiny-pythia-res-batchtopk", "tiny-gpt2-res-standard"]
    items = sweep_items(["tiny-gpt2", "tiny-pythia"], ["ioi", "order"], sets, n=64, options=SweepOptions(sites=("v",)))
    assert loaded == ["tiny-gpt2", "tiny-pythia"] and len(items) == 6
    assert [(item.key.model, item.key.task) for item in items] == [
        (model, task) for model, sets in (("tiny-gpt2", 2), ("tiny-pythia", 1)) for task in ("ioi", "order")
        for _ in range(sets)]


def test_what_a_process_claims_is_free_when_it_is_killed():
    names = [f"{name} of {os.getpid()}" for name in "ab"]
    program = "\n".join(["import sys", "from sage_nb.lab.sweeps import claim", "print(claim(sys.argv[1:]), flush=True)",
                         "sys.stdin.read()"])
    run = [sys.executable, "-c", program, *names]
    others = [subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        got = [other.stdout.readline().strip() for other in others]
        assert sorted(got) == ["0", "1", "None"] and sweeps.claim(names) is None
        first = others[got.index("1")]
        first.kill()
        first.wait()
        assert sweeps.claim(names) == 1
    finally:
        for other in others:
            other.kill()
            other.communicate()


def test_workers_without_a_gpu_each_are_refused(tmp_path, no_work):
    n = torch.cuda.device_count()
    for others in (dict(device="cuda", jobs=max(2, n + 1)), dict(device="cuda:0", jobs=2),
                   dict(device="cuda", jobs=2, backend="threading")):
        with pytest.raises(ValueError, match="need a GPU each|no such device"): swept(tmp_path / "new", **others)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_the_numbers_of_the_cpu(unbroken, tmp_path):
    first = swept(tmp_path, SETS[:1], device="cuda")
    sweeps._leave()  # the next cell reads the ground truth from disk
    both = swept(tmp_path, SETS[:2], device="cuda")
    assert (first.made, both.made, both.status) == (1, 1, 0)
    for cell in both.cells:
        same = next(other for other in unbroken.cells if other.key == cell.key)
        assert cell.methods[0]["score"] == pytest.approx(same.methods[0]["score"], abs=0.01)
