"""Sweeps on real engines: a worker is killed in the middle, and the numbers are those of an undisturbed sweep."""
import os
import signal
import time
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from threading import Event, Thread

import psutil
import pytest
from test_sweeps import FEW, SETS, numbers, one_thread, swept, unbroken  # noqa: F401  two are fixtures

from sage_nb.lab import sweeps
from sage_nb.lab.cells import CellKey, cells_in, read_cell
from sage_nb.lab.sweeps import CellJob, Frame, sweep

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
def test_ray_loses_a_worker(unbroken, tmp_path):
    with ray_cluster() as ray:
        check_after_a_death(unbroken, tmp_path, "ray")
        assert ray.is_initialized(), "what the user connected to stays connected"
