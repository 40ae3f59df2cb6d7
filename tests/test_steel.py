"""What happens to sweeps in the world: two at once, a full disk, a clock that goes back, other workers and batches."""
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from test_sweeps import FEW, PROGRAM, SETS, files_in, numbers, one_thread, out, path_of, swept, unbroken  # noqa: F401

from sage_nb.lab import sweeps
from sage_nb.lab.cells import cells_in
from sage_nb.lab.sweeps import find_ground, sweep_items
from sage_nb.report.evaluation import evaluate
from sage_nb.report.report import evidence_tensors
from sage_nb.saes.sets import load_saes


def test_two_sweeps_into_one_folder_at_once(unbroken, tmp_path):
    "The same cells, in two orders: each may make all of them, and what is there is whole and the same."
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), *some]) for some in (SETS, SETS[::-1])]
    assert [run.wait() for run in both] == [0, 0]
    found = swept(tmp_path)
    assert found.made == 0 and numbers(found) == numbers(unbroken) and not cells_in(tmp_path).refused
    assert files_in(tmp_path) == files_in(unbroken.out), "nothing half written, no marks"


# Disks

@pytest.fixture
def small_disk(tmp_path):
    "A file system of 2 MiB; not everybody may mount one."
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    said = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if said is None or said.returncode: pytest.skip("a small disk cannot be mounted here")
    try: yield place
    finally: subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_in_the_middle(unbroken, small_disk, monkeypatch):
    "There was room when the sweep began; then another program took it."
    monkeypatch.setattr(sweeps, "evaluate", fill_after_one(small_disk))
    with pytest.raises(OSError, match="No space left on device") as caught: swept(small_disk / "results")
    assert "1 of 3 cells were made and are kept" in caught.value.__notes__[0]
    there = cells_in(small_disk / "results")
    assert len(there.cells) == 1 and not there.refused and not list((small_disk / "results").glob("*/.*.part"))
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    again = swept(small_disk / "results")
    assert again.made == 2 and numbers(again) == numbers(unbroken)


def fill_after_one(disk):
    "An evaluation that takes all the room from the second cell on."
    made = []

    def filling(*args, **others):
        made.append(evaluate(*args, **others))
        if len(made) == 2:
            with (disk / "filler").open("wb") as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))
                    file.flush()
        return made[-1]
    return filling


# Clocks

def test_a_clock_that_was_set_back(unbroken, out, monkeypatch):
    "Results of tomorrow and of 1970 are results; what is made then is counted, too."
    for i, path in enumerate(path for path in out.rglob("*") if path.is_file()):
        os.utime(path, (0, 0) if i % 2 else (4e9, 4e9))
    assert swept(out).made == 0
    path_of(out, SETS[1]).unlink()
    monkeypatch.setattr(sweeps.time, "time", lambda: 0.0)
    again = swept(out)
    assert again.made == 1 and numbers(again) == numbers(unbroken) and again.cells[1].cost["seconds"] > 0


# The same numbers, whatever the batches

def test_other_batches_find_the_same_to_rounding():
    """Exact equality holds for the same batches only: products of matrices of other sizes are summed in another order.
    Measured in batches of 1 to 16 against 64: single prompts differ by 1.2e-5 nats at most, scores by 2.2e-8."""
    frame = sweep_items("tiny-gpt2", "ioi", SETS[:1], n=64, options=FEW)[0].frame
    loaded, task = frame.load()
    ground, saes = find_ground(loaded, task, frame.options), load_saes(SETS[0])

    def found(size):
        return evaluate(loaded, task, *ground, saes, batch_size=size, diagnostics=False, explorers=False, table=False,
                        progress=False, **frame.options.of_evaluation)
    one, other = found(3), found(64)
    pd.testing.assert_frame_equal(one.scores, other.scores, check_exact=False, rtol=0, atol=1e-6)
    for name, some in one.evidence.items():
        for a, b in zip(some, other.evidence[name], strict=True):
            torch.testing.assert_close(evidence_tensors(a), evidence_tensors(b), rtol=0, atol=1e-4, equal_nan=True)
