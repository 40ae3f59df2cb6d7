"""Score, sweep and leaderboard on the command line: what is said where, exit status, files, and how one goes on."""
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
from made_up_cells import write_one
from test_cli import heeded_interrupts  # noqa: F401  a fixture
from test_sweeps import files_in, no_work, one_thread  # noqa: F401  two are fixtures

from sage_nb.core.models import EMBEDDED
from sage_nb.lab import sweeps
from sage_nb.lab.cells import cells_in
from sage_nb.lab.cli import Leaderboard, Score, Sweep, main, parse
from sage_nb.lab.leaderboard import leaderboard
from sage_nb.report.report import SageReport

SMALL = ["--sites", "v", "--attributes", "IO", "--n", "64"]
SETS = ["tiny-gpt2-res-topk", "tiny-gpt2-res-standard"]


def sweep(out, *others, saes=SETS): return main(["sweep", "--saes", ",".join(saes), *SMALL, "--out", str(out), *others])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    "Nothing is written where it was not asked for."
    folder = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(folder)
    yield
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    "A folder that a sweep of two sets has written to."
    folder = tmp_path_factory.mktemp("swept")
    assert sweep(folder, "--quiet") == 0
    return folder


@pytest.fixture
def out(swept, tmp_path): return shutil.copytree(swept, tmp_path / "results")


def lose(out, name):
    "Take the cell of a set away."
    path, = (path for path in out.glob("cells/*.json") if f'"sae": "{name}"' in path.read_text())
    path.unlink()


# score

def test_score_writes_nothing_and_has_the_numbers_of_the_sweep(swept, capsys):
    assert main(["score", *SMALL, "--json"]) == 0
    out, err = capsys.readouterr()
    scores = pd.DataFrame(json.loads(out)["scores"]).set_index("sae")["score"]
    cell, = (cell for cell in cells_in(swept).cells if cell.key.sae == SETS[0])
    assert scores[SETS[0]] == pytest.approx(cell.methods[0]["score"], abs=1e-9) and err == ""


def test_score_prints_the_card_and_writes_a_report_where_it_is_asked_to(tmp_path, capsys):
    argv = ["score", *SMALL, "--out", str(tmp_path / "new")]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith("SAGE scorecard: ioi on tiny-gpt2, 1 of 1 cross-sections counted\n") and err == ""
    assert out.endswith(f"report: {tmp_path / 'new' / 'report.html'}\n") and "tiny-gpt2-res-topk, random twin" in out
    assert {"report.html", "report.json", "sections.csv", "command.json"} <= set(files_in(tmp_path / "new"))
    assert len(pd.read_csv(tmp_path / "new" / "sections.csv")) == len(SageReport.load(tmp_path / "new").sections) == 1
    assert main([*argv[:-2], "--seed", "1", *argv[-2:]]) == 1
    assert "what sage_nb score found with seed 0, not 1; --overwrite replaces it" in capsys.readouterr().err


# sweep

def test_options_reach_the_sweep():
    argv = "sweep --models a,b --tasks ioi --saes re:x{1,2},y/* --seeds 0,2 --jobs 3 --no-qk-fix --revision main"
    assert parse(argv.split()) == Sweep(models=["a", "b"], tasks=["ioi"], saes=["re:x{1,2}", "y/*"], seeds=[0, 2],
                                        jobs=3, qk_fix=False, revision="main")
    assert (parse(["sweep"]), parse(["leaderboard"]), parse(["score"])) == (Sweep(), Leaderboard(), Score())


def test_a_sweep_says_what_it_did_and_does_nothing_twice(out, no_work, capsys):
    before = files_in(out)
    assert sweep(out) == 0
    said, err = capsys.readouterr()
    assert said == (f"2 of 2 cells are done, 0 of them made now; they are in {out}\n"
                    f"sage_nb leaderboard {out} shows them\n") and err == ""
    assert sweep(out, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["made"], record["failed"], [row["sae"] for row in record["cells"]]) == (0, 0, SETS)
    assert sweep(out, "--quiet") == 0
    assert capsys.readouterr() == ("", "") and files_in(out) == before


def test_a_first_dry_run_tries_a_cell_and_writes_nothing(tmp_path, capsys):
    assert sweep(tmp_path / "new", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert out.startswith("2 of 2 cells to do: about ") and "s on one worker (tiny-gpt2: by a trial)" in out and not err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_beside_results_computes_nothing(swept, no_work, capsys):
    assert sweep(swept, "--dry-run", "--json", "--seeds", "0,1") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["to do"] == 2 and plan["seconds"] > 0 and [row["done"] for row in plan["frames"]] == [2, 0]
    assert plan["basis"] == {"tiny-gpt2": "by 2 cells"}


def test_folders_and_expressions_name_sets(tmp_path, capsys):
    for name in "ab": shutil.copytree(EMBEDDED / "saes" / SETS[0], tmp_path / "mine" / name)
    argv = ["--saes", f"{tmp_path}/mine/*,re:tiny-gpt2-res-(topk|standard)", *SMALL, "--out", str(tmp_path / "new")]
    assert main(["sweep", *argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("4 of 4 cells to do")


def test_a_failed_cell_is_named_and_tried_again(out, monkeypatch, capsys):
    evaluate = sweeps.evaluate

    def broken(model, task, sections, truth, saes, **others):
        if saes.name == SETS[1]: raise RuntimeError("the GPU is gone")
        return evaluate(model, task, sections, truth, saes, **others)
    lose(out, SETS[1])
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "evaluate", broken)
        assert sweep(out) == 3
        said, err = capsys.readouterr()
        assert "1 of 2 cells are done" in said and f"failed: {SETS[1]} on ioi, tiny-gpt2, seed 0: RuntimeError" in said
        assert err.startswith(f"sage_nb: 1 of 2 cells failed, the first: {SETS[1]} on ioi") and err.count("\n") == 1
        assert "the same command tries them again" in err
    with monkeypatch.context() as patch:  # somebody watches
        patch.setattr(sys.stderr, "isatty", lambda: True)
        assert sweep(out, "--json") == 0
    said, bar = capsys.readouterr()
    assert json.loads(said)["made"] == 1
    assert "sweep:" in bar and "0/1 [" in bar and "<" in bar, "done, taken and left"


def test_an_interrupted_sweep_says_what_is_kept(out, monkeypatch, capsys):
    "Also where something on the way makes another error of Ctrl-C, as imports do."
    for name in SETS: lose(out, name)
    evaluate = sweeps.evaluate

    def stopped(model, task, sections, truth, saes, **others):
        if saes.name == SETS[1]:
            try: signal.raise_signal(signal.SIGINT)
            except BaseException: raise RuntimeError("import failed") from None
        return evaluate(model, task, sections, truth, saes, **others)
    monkeypatch.setattr(sweeps, "evaluate", stopped)
    assert sweep(out) == 130
    assert capsys.readouterr() == ("", "sage_nb: interrupted; 1 of 2 cells were made and are kept in "
                                   f"{out}; the same sweep again goes on from there\n")


def test_an_interrupt_before_the_first_cell_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "load_sets", lambda source: signal.raise_signal(signal.SIGINT))
    assert sweep(tmp_path / "new") == 130
    assert capsys.readouterr().err == "sage_nb: interrupted; nothing new was made\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, said", [
    (["--n", "24"], "task 'ioi' holds out 8 of 24 prompts, and no cross-section counts with fewer than 10"),
    (["--saes", "tiny-gpt2-z-topk"], "SAE set 'tiny-gpt2-z-topk' speaks for no node of site q"),
    (["--models", "tiny-pythia", "--saes", "tiny-pythia-res-batchtopk", "--sites", "resid_mid"],
     "sites: 'resid_mid' is not one of resid_pre, q, k"),
])
def test_what_could_only_fail_is_refused_before_any_work(argv, said, tmp_path, no_work, capsys):
    assert main(["sweep", "--out", str(tmp_path / "new"), *argv]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sage_nb: ") and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_workers_print_is_not_shown(out, monkeypatch, capfd):
    def chatty(*args, **others):
        subprocess.run(["echo", "Loaded pretrained model"], check=True)
        print("so does a library")
    monkeypatch.setattr(sweeps, "_check_room", chatty)
    assert sweep(out, "--json") == 0
    assert json.loads(capfd.readouterr().out)["made"] == 0 and "PYTHONWARNINGS" not in os.environ


# leaderboard

@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Made-up results: three SAEs on two tasks with two seeds."
    folder = tmp_path_factory.mktemp("results")
    for name, quality in {"A": 0.8, "B": 0.6, "C": 0.1}.items():
        for task in ("ioi", "order"):
            for seed in (0, 1): write_one(folder, name, quality, task, seed)
    return folder


def test_the_table_is_that_of_the_api(results, capsys):
    table = leaderboard(results)
    assert main(["leaderboard", str(results)]) == 0
    out, err = capsys.readouterr()
    first = table.iloc[0]
    assert len(out.splitlines()) == 7 and err == ""
    assert f"A  tiny   ioi {first.score:.2f} [{first.lo:.2f}, {first.hi:.2f}]" in out
    assert main(["leaderboard", str(results), "--csv"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(capsys.readouterr().out)), table, check_dtype=False)
    assert main(["leaderboard", str(results), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["sae"], row["task"]) for row in rows] == list(zip(table.sae, table.task))
    assert [row["score"] for row in rows] == pytest.approx(table.score.tolist())


@pytest.mark.parametrize("where, n", [
    (["task=ioi"], 3), (["task=ioi,sae=A"], 1), (["task=ioi", "--where", "sae=A,sae=B"], 2), (["seed=0"], 6),
    (["settings.tests=[1,2,3]"], 6), (["settings.tests=[1, 2, 3],sae=C"], 2), (["revision=null"], 6)])
def test_where_chooses(where, n, results, capsys):
    assert main(["leaderboard", str(results), "--json", "--where", *where]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == n


@pytest.mark.parametrize("where, said", [
    ("tsak=ioi", "where has 'tsak', which no result has"), ("tsak=ioi", ": did you mean task?"),
    ("task=ioy", "no result has task 'ioy' (has "), ("task=ioy", ": 6): did you mean ioi?")])
def test_a_wrong_where_is_refused_with_what_was_meant(where, said, results, capsys):
    assert main(["leaderboard", str(results), "--where", where]) == 1
    out, err = capsys.readouterr()
    assert said in err and out == "" and err.count("\n") == 1


def test_kinds_that_do_not_mix_are_chosen_by_the_words_of_the_error(results, tmp_path, capsys):
    folder = shutil.copytree(results, tmp_path / "mixed")
    write_one(folder, "A", 0.7, settings={"n": 80, "tests": [1, 2]})
    assert main(["leaderboard", str(folder)]) == 1
    words = capsys.readouterr().err.partition("in a shell by --where '")[2].partition("'")[0]
    assert words == "settings.tests=[1, 2, 3]"
    assert main(["leaderboard", str(folder), "--where", words]) == 0


def test_the_page_is_written_whole_and_replaces_nothing_unasked(results, tmp_path, monkeypatch, capsys):
    page = tmp_path / "new" / "board.html"
    argv = ["leaderboard", str(results), "--page", str(page)]
    assert main(argv) == 0
    assert capsys.readouterr().out.endswith(f"page: {page}\n")
    text = page.read_text()
    assert "Leaderboard: 3 SAEs" in text and "http://" not in text.replace("http://www.w3.org", "")
    assert main(argv) == 1
    assert f"--page '{page}' exists; --overwrite replaces it, or give another file" in capsys.readouterr().err

    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    page.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main([*argv, "--overwrite"]) == 1
    out, err = capsys.readouterr()
    assert "sae model" in out, "the table is shown before anything can fail"
    assert "No space left on device" in err and page.read_text() == "mine" and files_in(tmp_path) == ["new/board.html"]
    assert main([*argv, "--overwrite", "--quiet"]) == 0
    assert page.read_text() == text and capsys.readouterr() == ("", "")


def test_what_is_no_result_is_left_out_with_one_line_for_each_kind(swept, out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "warnoptions", [])
    (out / "cells" / ("0" * 32 + ".json")).write_text("<html>404 Not Found</html>")
    (out / "cells" / "notes.json").write_text("[]")
    (out / "cells" / "holiday.jpg").write_bytes(b"\xff\xd8")
    (out / "report.html").touch()
    assert main(["leaderboard", str(out), "--page", str(out / "board.html")]) == 0
    said, err = capsys.readouterr()
    assert err.startswith("sage_nb: warning: 1 of 3 files are left out; the first: ") and err.count("\n") == 1
    assert all(name in said for name in SETS)


def test_a_reader_that_goes_away_does_not_keep_the_page_from_being_written(results, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["leaderboard", str(results), "--page", str(tmp_path / "board.html")]) == 0
        monkeypatch.undo()
    assert (tmp_path / "board.html").exists()
