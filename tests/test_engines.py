"""Sweeps on real engines: a worker is killed in the middle, and the numbers are those of an undisturbed sweep."""
import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from threading import Event, Thread

import psutil
import pytest
from test_sweeps import FEW, SETS, numbers, one_thread, swept, unbroken  # noqa: F401  two are fixtures

from sage_nb.lab import sweeps
from sage_nb.lab.cells import CellKey, cells_in
from sage_nb.lab.sweeps import CellJob, Frame

needs_dask = pytest.mark.skipif(find_spec("distributed") is None, reason="distributed is not installed")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


@contextmanager
def a_death(out):
    "Within it the first process of a worker that makes a cell, after the first cell is there, is killed."
    killed, over = [], Event()

    def wait():
        while not over.wait(0.01):
            if not list(out.glob("cells/*.json")): continue
            for mark in out.glob("running/*"):
                with suppress(OSError, ValueError):
                    pid = int(mark.read_text().split()[1])
                    if pid == os.getpid(): continue
                    os.kill(pid, signal.SIGKILL)
                    return killed.append(pid)
    watcher = Thread(target=wait, daemon=True)
    watcher.start()
    try: yield killed
    finally:
        over.set()
        watcher.join()


@contextmanager
def dask_cluster(workers=2):
    "A cluster with an active client."
    from distributed import Client, LocalCluster
    local = dict(n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None)
    with LocalCluster(**local) as cluster, Client(cluster) as client: yield client


@contextmanager
def ray_cluster():
    "Ray on this machine."
    import ray
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False,
             object_store_memory=100 * 2**20)
    try: yield ray
    finally: ray.shutdown()


def check_after_a_death(unbroken, out, backend):
    "After a sweep in which a worker is killed all is there, or the same sweep again brings it."
    with a_death(out) as killed: found = swept(out, jobs=2, backend=backend)
    assert len(killed) == 1 and not psutil.pid_exists(killed[0]), "nobody was killed"
    assert found.status == 0 and numbers(found) == numbers(unbroken)
    assert not list(out.glob("running/*")) and not list(out.glob("*/.*.part"))


def test_loky_loses_a_worker(unbroken, tmp_path): check_after_a_death(unbroken, tmp_path, "loky")


@needs_dask
def test_dask_loses_a_worker(unbroken, tmp_path):
    with dask_cluster() as client:
        check_after_a_death(unbroken, tmp_path, "dask")
        assert client.status == "running", "the user's client is the user's"


@needs_ray
@pytest.mark.ray
def test_ray_loses_a_worker(unbroken, tmp_path):
    with ray_cluster() as ray:
        check_after_a_death(unbroken, tmp_path, "ray")
        assert ray.is_initialized(), "what the user connected to stays connected"


def slurm_is_here():
    "Does a SLURM take jobs?"
    with suppress(OSError): return subprocess.run(["sinfo", "-h"], capture_output=True).returncode == 0
    return False


@pytest.mark.slow
@pytest.mark.skipif(find_spec("dask_jobqueue") is None, reason="dask-jobqueue is not installed")
@pytest.mark.skipif(not slurm_is_here(), reason="there is no SLURM")
def test_slurm_loses_a_job(unbroken, tmp_path):
    from dask_jobqueue import SLURMCluster
    from distributed import Client
    cancelled = []

    def cancel():
        while not list(tmp_path.glob("results/cells/*.json")): time.sleep(0.01)
        running = ["squeue", "-h", "-t", "R", "-n", "dask-worker", "-o", "%i"]
        cancelled.append(subprocess.run(running, capture_output=True, text=True).stdout.split()[0])
        subprocess.run(["scancel", cancelled[0]], check=True)
    local = dict(host="127.0.0.1", dashboard_address=None)
    with SLURMCluster(cores=1, processes=1, memory="2GB", walltime="00:10:00", log_directory=str(tmp_path),
                      scheduler_options=local) as cluster, Client(cluster) as client:
        cluster.adapt(minimum=2, maximum=2)
        client.wait_for_workers(2, timeout=120)
        canceller = Thread(target=cancel, daemon=True)
        canceller.start()
        found = swept(tmp_path / "results", jobs=2, backend="dask")
        canceller.join(1)
    assert len(cancelled) == 1 and found.status == 0 and numbers(found) == numbers(unbroken)
    assert not list(tmp_path.glob("results/running/*"))


# Clusters that are not there, and workers of several threads

@needs_dask
def test_dask_without_a_client_starts_workers_and_ends_them(unbroken, tmp_path):
    "Nothing stays: neither a client that a later sweep would take for the user's, nor a process."
    from distributed import get_client
    found = swept(tmp_path, SETS[:1], jobs=2, backend="dask")
    assert found.made == 1 and numbers(found).items() <= numbers(unbroken).items()
    with pytest.raises(ValueError, match="No global client"): get_client()
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline()) and p.is_running()]


@needs_dask
@pytest.mark.slow
def test_a_worker_of_several_threads_makes_one_cell_at_a_time(unbroken, tmp_path):
    from distributed import Client, LocalCluster
    local = dict(n_workers=1, threads_per_worker=3, processes=True, host="127.0.0.1", dashboard_address=None)
    with LocalCluster(**local) as cluster, Client(cluster): found = swept(tmp_path, jobs=3, backend="dask")
    assert found.status == 0 and numbers(found) == numbers(unbroken)


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_cluster_for_one_cell_at_a_time_is_no_cluster(backend, tmp_path):
    if find_spec({"dask": "distributed"}.get(backend, backend)) is None: pytest.skip(f"{backend} is not installed")
    with pytest.raises(ValueError, match="would make every cell in this process: say with jobs"):
        swept(tmp_path, jobs=1, backend=backend)


# Cells over which workers die

def a_job(sae):
    "An item whose cell has no numbers."
    key = CellKey("m", "0", None, {}, "float32", "t", "0", 4, 0, sae, "0", {})
    return CellJob(Frame("m", None, None, "t", 4, 0, FEW), key, sae)


def make_or_die(item, out):
    "A worker's work; one item ends it."
    if sweeps.is_done(out, item.key): return "done"
    with sweeps._marked(out, item.key):
        time.sleep(0.2)
        if item.source == "deadly": os.kill(os.getpid(), signal.SIGKILL)
        sweeps.write_cell(out, sweeps.Cell(item.key, methods=({"sae": item.source, "kind": "sae", "score": 0.5},)))
    return "done"


def check_that_only_the_deadly_failed(items, out):
    found = {cell.key.sae: cell.status for cell in cells_in(out).cells}
    assert found == {item.key.sae: "failed" if item.source == "deadly" else "done" for item in items}
    deadly = next(cell for cell in cells_in(out).cells if cell.key.sae == "deadly")
    assert deadly.error.startswith("workers died twice while they made it, perhaps for want of memory (")
    assert not list(out.glob("running/*"))


ITEMS = [a_job(name) for name in ("first", "deadly", "second", "third")]


def test_who_was_making_a_cell_when_another_died_is_not_to_blame(tmp_path, monkeypatch):
    "An engine that ends all workers with the one that dies, and four cells at once."
    tries = []

    def make(items, out, jobs, backend):
        tries.append([item.source for item in items])
        (tmp_path / "running").mkdir(exist_ok=True)
        for item in items: (tmp_path / "running" / item.key.name).write_text("elsewhere 1")
        if "deadly" in tries[-1]: raise RuntimeError("a worker is gone")
        for item in items: make_or_die(item, out)
    monkeypatch.setattr(sweeps, "_make", make)
    sweeps._spread(ITEMS, str(tmp_path), 4, "loky")
    check_that_only_the_deadly_failed(ITEMS, tmp_path)
    assert tries[1:3] == [["first"], ["deadly"]], "alone"


def test_an_engine_that_fails_over_nothing_is_not_tried_for_ever(tmp_path, monkeypatch):
    "Nobody died over a cell and nothing was made: the error is the user's to see."
    def make(items, out, jobs, backend): raise RuntimeError("there are only 2 CPUs in the ray cluster")
    monkeypatch.setattr(sweeps, "_make", make)
    with pytest.raises(RuntimeError, match="only 2 CPUs"): sweeps._spread(ITEMS, str(tmp_path), 4, "ray")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_a_cell_that_kills_every_worker_is_recorded_and_the_others_are_made(backend, tmp_path, monkeypatch):
    if backend == "dask" and find_spec("distributed") is None: pytest.skip("distributed is not installed")
    monkeypatch.setattr(sweeps, "make_cell", make_or_die)
    for item in ITEMS: sweeps.write_whole(sweeps._ground_path(tmp_path, item.key), b"")
    with sweeps._engine(backend, 2): sweeps._spread(ITEMS, str(tmp_path), 2, backend)
    check_that_only_the_deadly_failed(ITEMS, tmp_path)
