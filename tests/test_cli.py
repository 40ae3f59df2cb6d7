"""The command line: exit status, streams, files, and what a signal leaves behind."""
import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
import warnings
from dataclasses import replace

import pandas as pd
import pytest

import sage_nb
from sage_nb.core.hub import write_whole
from sage_nb.lab import cli
from sage_nb.lab.cli import COMMANDS, Discover, Evaluate, check_fit, main, parse
from sage_nb.lab.results import RECORD, Results, other_results

PROGRAM = [sys.executable, "-c", "from sage_nb.lab.cli import main; raise SystemExit(main())"]
SMALL = ["--sites", "z", "--n", "60"]
FINISHED = [RECORD, "evidence.safetensors", "explorers.json", "report.html", "report.json", "saebench", "sections.csv",
            "table.csv"]
UNFINISHED = [RECORD, "evidence.safetensors", "report.json", "sections.csv", "table.csv"]


def files_in(folder): return sorted(path.name for path in folder.iterdir())


def no_parts(folder): return not list(folder.rglob("*.part"))


# Help and version

@pytest.fixture(autouse=True)
def heeded_interrupts():
    "Ctrl-C as it is in a terminal, also where the tests were started in the background, which ignores it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], []])
def test_help_returns_0(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", ["discover", "evaluate", "score"])
def test_help_of_a_command_names_and_explains_its_options(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--model", "--task", "--n", "--seed", "--out", "--no-qk-fix", "embedded model, folder or hub name"):
        assert option in out
    assert ("--saes" in out) == (command != "discover")


def test_help_of_the_doctor(capsys):
    assert main(["doctor", "--help"]) == 0
    out = capsys.readouterr().out
    assert "MODEL" in out and "embedded model, folder or hub name" in out and "--json" in out and "--task" not in out


def test_versions(capsys):
    assert main(["-V"]) == 0
    assert capsys.readouterr().out == f"sage_nb {sage_nb.__version__}\n"
    assert main(["--version"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["sage_nb", "python", "torch", "transformer_lens", "sae_lens", "transformers"]


@pytest.mark.parametrize("argv", [["--help"], ["evaluate", "--help"], ["doctor", "--help"], ["sweep", "--help"],
                                  ["leaderboard", "--help"], ["--version"], ["fly"], ["evaluate", "--n", "x"]])
def test_nothing_heavy_is_imported_to_say_so(argv):
    program = f"""
import sys
from sage_nb.lab.cli import main
main({argv})
print(sorted({{"torch", "transformers", "sae_lens", "pandas"}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Options

def test_options_reach_the_command():
    job = parse("evaluate --saes a,b --sites q,z --attributes IO --n=96 --seed 3 --no-qk-fix --force --json".split())
    assert job == Evaluate(saes=["a", "b"], sites=["q", "z"], attributes=["IO"], n=96, seed=3, qk_fix=False,
                           force=True, json=True)
    assert parse(["discover"]) == Discover()


@pytest.mark.parametrize("change", [
    {"model": "tiny-gemma"}, {"task": "order"}, {"n": 97}, {"seed": 1}, {"sites": ["z"]}, {"attributes": ["IO"]},
    {"qk_fix": False}, {"saes": ["tiny-gpt2-res-standard"]}, {"products": True}, {"force": True}])
def test_each_option_that_decides_the_result_makes_another_evaluation(change, tmp_path):
    first, other = Evaluate(n=96), replace(Evaluate(n=96), **change)
    (tmp_path / "report.json").touch()
    (tmp_path / RECORD).write_text(json.dumps({"evaluate": first.options()}))
    assert other_results(tmp_path, first.options()) is None
    assert next(iter(change)).replace("_", "-").split("-")[0] in other_results(tmp_path, other.options())


def test_rows_that_changed_make_another_evaluation(tmp_path):
    task = tmp_path / "mine.json"
    row = {"prompt": "Mary saw", "answer": " John", "distractor": " Tom", "attributes": {"who": "Mary"},
           "counterfactuals": {"who": {"prompt": "Anna saw", "answer": " Tom", "value": "Anna"}}, "held_out": False}
    other = {"prompt": "Anna saw", "answer": " Tom", "distractor": " John", "attributes": {"who": "Anna"},
             "counterfactuals": {"who": {"prompt": "Mary saw", "answer": " John", "value": "Mary"}}, "held_out": False}
    rows = [row, other, row | {"prompt": "Then Mary saw", "held_out": True}]
    task.write_text(json.dumps({"rows": rows}))
    before = Discover(task=str(task)).options()
    assert before["task"] == str(task) and before["n"] is None and before["attributes"] == ["who"]
    task.write_text(json.dumps({"rows": rows + [row | {"prompt": "Now Mary saw"}]}))
    assert Discover(task=str(task)).options()["rows"] != before["rows"]


# Do the SAEs fit? Checked before the search

@pytest.fixture
def no_search(monkeypatch):
    def search(*args, **kwargs): raise AssertionError("the search began before everything was checked")
    monkeypatch.setattr(sage_nb, "find_cross_sections", search, raising=False)


@pytest.mark.parametrize("argv,said", [
    (["--saes", "tiny-gpt2-z-topk"], "'tiny-gpt2-z-topk' speaks for no node of site q (has L0.z, L1.z"),
    (["--model", "tiny-pythia", "--saes", "tiny-pythia-res-batchtopk", "--sites", "resid_mid"],
     "--sites: 'resid_mid' is not one of resid_pre, q, k"),
    (["--n", "3"], "task 'ioi': "),
    (["--n", "24"], "task 'ioi' holds out 8 of 24 prompts, and no cross-section counts with fewer than 10"),
])
def test_what_needs_the_model_is_refused_before_the_search(argv, said, tmp_path, capsys, no_search):
    assert main(["evaluate", "--out", str(tmp_path / "new"), *argv]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sage_nb: ") and said in err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_saes_of_another_place_or_width_are_refused(model, task):
    saes = sage_nb.load_saes("tiny-gpt2-res-topk")
    (place, sae), *_ = saes.saes.items()
    for node, said in [(place._replace(layer=4), "an SAE at L4.resid_pre, and the model has no such place (4 layers"),
                       (place._replace(site="z", head=1), "reads 128 values at L0H1.z, and the model has 32 there")]:
        moved = sage_nb.SAESet("moved", {node: replace(sae, node=node)})
        with pytest.raises(ValueError) as caught: check_fit(model, task, [moved], ["z"])
        assert said in str(caught.value)
    check_fit(model, task, [saes], ["q", "k", "v", "z", "resid_pre"])


# With stand-ins for what takes long

class Found:
    "Stands in for cross-sections."
    settings = {}

    def __len__(self): return 2
    def __str__(self): return "IO z@END"
    def table(self): return pd.DataFrame({"attribute": ["IO", "S"]})
    def missing(self): return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder with the results of a small evaluation, for real."
    folder = tmp_path_factory.mktemp("finished")
    assert main(["evaluate", *SMALL, "--out", str(folder), "--json", "--quiet"]) == 0
    return folder


@pytest.fixture
def report(finished): return sage_nb.SageReport.load(finished)


def part_of(report):
    "As an evaluation gives it: without explorers, which are made at the end."
    return replace(report, settings=report.settings | {"partial": "1 of 2 cross-sections"}, explorers={})


@pytest.fixture
def stand_ins(monkeypatch, report):
    "Everything that takes long returns at once; `stand_ins(evaluate)` puts another evaluation in."
    def put(evaluate):
        instead = {"load_model": lambda *args, **kwargs: None, "load_task": lambda *args, **kwargs: None,
                   "load_saes": lambda name, device: None, "find_cross_sections": lambda *args, **kwargs: Found(),
                   "fit_dictionaries": lambda *args, **kwargs: None, "evaluate": evaluate}
        for name, function in instead.items(): monkeypatch.setattr(sage_nb, name, function, raising=False)
        monkeypatch.setattr(cli, "check_fit", lambda *args: None)
    put(lambda *args, **kwargs: report)
    return put


def stopped_after_one(report, stop):
    def evaluate(*args, on_section, **kwargs):
        on_section(part_of(report))
        stop()
        return report
    return evaluate


def test_the_files_of_an_evaluation(finished, report):
    assert files_in(finished) == FINISHED and no_parts(finished)
    assert len(pd.read_csv(finished / "sections.csv")) == len(report.sections)
    assert "partial" not in report.settings
    assert list(json.loads((finished / RECORD).read_text())) == ["evaluate"]


def test_a_dry_run_says_what_it_will_take_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "results"
    ask = ["evaluate", *SMALL, "--attributes", "IO", "--out", str(out), "--json", "--dry-run"]
    assert main(ask) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["prompts"] == 60 and set(plan["passes"]) == {"checks", "baselines", "true runs", "tests"}
    assert plan["passes"]["tests"] > 0.3 and plan["seconds"]["tests"] > 0 and plan["memory"] > 2**27
    assert not out.exists()


def test_the_same_evaluation_may_be_run_again(stand_ins, tmp_path, capsys):
    for _ in range(2): assert main(["evaluate", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(f"report: {tmp_path}") == 2
    assert files_in(tmp_path) == FINISHED


def test_discovery_and_evaluation_of_the_same_share_a_folder(stand_ins, tmp_path):
    assert main(["discover", "--out", str(tmp_path), "--n", "96"]) == 0
    assert main(["evaluate", "--out", str(tmp_path), "--n", "96"]) == 0
    assert set(json.loads((tmp_path / RECORD).read_text())) == {"discover", "evaluate"}
    assert main(["evaluate", "--out", str(tmp_path), "--n", "95"]) == 1


def test_another_evaluation_needs_overwrite_and_leaves_nothing_of_the_first(stand_ins, tmp_path, report, capsys):
    assert main(["evaluate", "--out", str(tmp_path)]) == 0
    (tmp_path / "mine.txt").touch()
    (tmp_path / "saebench" / "old_eval_results.json").touch()
    assert main(["evaluate", "--out", str(tmp_path), "--n", "96"]) == 1
    assert "found with n 1024, not 96; --overwrite replaces it" in capsys.readouterr().err

    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    stand_ins(interrupted)
    assert main(["evaluate", "--out", str(tmp_path), "--n", "96", "--overwrite"]) == 130
    assert files_in(tmp_path) == [RECORD, "mine.txt", "saebench", "sections.csv"]
    assert not list((tmp_path / "saebench").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_sections_so_far(number, stand_ins, report, tmp_path, capsys):
    stand_ins(stopped_after_one(report, lambda: signal.raise_signal(number)))
    assert main(["evaluate", "--out", str(tmp_path)]) == 130
    kept = f"kept in {tmp_path}: sections.csv, the report of 1 of 2 cross-sections"
    assert capsys.readouterr().err == f"sage_nb: interrupted; {kept}\n"
    assert files_in(tmp_path) == UNFINISHED and no_parts(tmp_path)
    assert sage_nb.SageReport.load(tmp_path).settings["partial"] == "1 of 2 cross-sections"
    stand_ins(lambda *args, **kwargs: report)
    assert main(["evaluate", "--out", str(tmp_path)]) == 0
    assert "partial" not in sage_nb.SageReport.load(tmp_path).settings


def test_a_signal_that_something_swallowed_still_interrupts(stand_ins, report, tmp_path, capsys):
    def clumsy():
        try: signal.raise_signal(signal.SIGINT)
        except BaseException: raise RuntimeError("import failed") from None
    stand_ins(stopped_after_one(report, clumsy))
    assert main(["evaluate", "--out", str(tmp_path)]) == 130
    assert "sage_nb: interrupted; kept in" in capsys.readouterr().err


def test_a_signal_before_the_search_is_done_keeps_nothing(stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sage_nb, "find_cross_sections", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    assert main(["evaluate", "--out", str(tmp_path / "new")]) == 130
    assert capsys.readouterr().err == "sage_nb: interrupted; nothing was kept\n"
    assert not (tmp_path / "new").exists()
    assert main(["discover"]) == 130
    assert capsys.readouterr().err == "sage_nb: interrupted; nothing was kept: there is no --out\n"


def test_a_finished_report_outlives_an_interrupted_run_of_the_same(stand_ins, report, tmp_path, capsys):
    assert main(["evaluate", "--out", str(tmp_path)]) == 0
    stand_ins(stopped_after_one(report, lambda: signal.raise_signal(signal.SIGINT)))
    assert main(["evaluate", "--out", str(tmp_path)]) == 130
    assert f"{tmp_path} holds the finished report of an earlier run" in capsys.readouterr().err
    assert files_in(tmp_path) == FINISHED
    assert "partial" not in sage_nb.SageReport.load(tmp_path).settings


def test_a_signal_waits_until_the_report_is_whole(tmp_path, report, monkeypatch):
    save = sage_nb.SageReport.save

    def signalled(self, folder, **options):
        signal.raise_signal(signal.SIGINT)
        return save(self, folder, **options)
    monkeypatch.setattr(sage_nb.SageReport, "save", signalled)
    results = Results(tmp_path, "evaluate", {"n": 96})
    with pytest.raises(KeyboardInterrupt): results.write_part(part_of(report))
    assert str(results) == f"kept in {tmp_path}: the report of 1 of 2 cross-sections"
    assert files_in(tmp_path) == sorted({*UNFINISHED} - {"sections.csv"})
    sage_nb.SageReport.load(tmp_path)


def test_a_full_disk_leaves_no_half_written_file(stand_ins, report, tmp_path, monkeypatch, capsys):
    def full(self, folder, **options):
        def no_room(number): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", no_room)
            write_whole(folder / "report.json", "{")
    monkeypatch.setattr(sage_nb.SageReport, "save", full)
    assert main(["evaluate", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert str(report) in out, "the scorecard is shown before anything can fail"
    assert "No space left on device" in err and f"kept in {tmp_path}: sections.csv" in err and err.count("\n") == 1
    assert files_in(tmp_path) == [RECORD, "sections.csv"]


def test_a_defect_keeps_its_traceback(stand_ins, tmp_path, capsys):
    stand_ins(lambda *args, **kwargs: {}["no such key"])
    assert main(["evaluate", "--out", str(tmp_path)]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and "KeyError: 'no such key'" in err
    assert err.splitlines()[-1].startswith("sage_nb: this is a defect of sage_nb, please report it")
    assert err.endswith(f"kept in {tmp_path}: sections.csv\n")


def test_a_value_error_from_below_is_a_defect_too(stand_ins, tmp_path, capsys):
    stand_ins(lambda *args, **kwargs: int("three"))
    assert main(["evaluate", "--out", str(tmp_path)]) == 70
    assert "Traceback" in capsys.readouterr().err


# Streams

def test_json_is_all_there_is_on_stdout(stand_ins, report, tmp_path, monkeypatch, capsys):
    def chatty(*args, **kwargs):
        print("Loaded pretrained model")
        return report
    stand_ins(chatty)
    assert main(["evaluate", "--out", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(report.to_json()) and err == ""
    assert main(["evaluate", "--out", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_our_warnings_take_one_line_and_others_none(stand_ins, report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "warnoptions", [])

    def load_task(*args, **kwargs):
        warnings.warn("task 'x' has only 15 different prompts here", stacklevel=2)
        warnings.warn("a library's own business")
    monkeypatch.setattr(sage_nb, "load_task", load_task)
    assert main(["evaluate", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "sage_nb: warning: task 'x' has only 15 different prompts here\n"


def test_flags_reach_what_they_are_for(stand_ins, report, tmp_path, monkeypatch):
    given = {}
    stand_ins(lambda *args, **kwargs: given.update(kwargs) or report)
    monkeypatch.setattr(sage_nb, "find_cross_sections", lambda *args, **kwargs: given.update(kwargs) or Found())
    assert main(["evaluate", "--out", str(tmp_path), "--no-qk-fix", "--force"]) == 0
    assert given["qk_fix"] is False and given["force"] is True
    assert given["verbose"] is False and given["progress"] is False, "stderr is no terminal here"


def test_a_device_is_given_to_model_and_saes(stand_ins, tmp_path, monkeypatch):
    devices = []
    monkeypatch.setattr(sage_nb, "load_model", lambda name, device, **others: devices.append(device))
    monkeypatch.setattr(sage_nb, "load_saes", lambda name, device: devices.append(device))
    assert main(["evaluate", "--out", str(tmp_path), "--device", "cuda:1"]) == 0
    assert devices == ["cuda:1", "cuda:1"]
    assert main(["evaluate", "--out", str(tmp_path)]) == 0, "where it was computed does not make it another result"


def test_results_go_under_the_home_folder_where_the_shell_did_not_see_it(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["discover", "--out=~/new"]) == 0
    assert files_in(tmp_path / "new") == [RECORD, "sections.csv"] and not os.path.exists("~")


# For real

def test_discover_writes_what_it_prints(tmp_path, capsys):
    assert main(["discover", "--task", "agreement", "--n", "36", "--out", str(tmp_path / "new")]) == 0
    table = pd.read_csv(tmp_path / "new" / "sections.csv")
    printed = [line for line in capsys.readouterr().out.splitlines() if "whole group" in line]
    assert len(table) == len(printed) > 0
    for row, line in zip(table.itertuples(), printed):
        assert line.split()[0] == row.attribute
        assert f"{row.site}@{row.position}: {row.nodes}  effect {row.effect:.2f}" in line
    assert "number" in set(table.attribute)
    assert (table.lo <= table.effect).all() and (table.effect <= table.hi).all()


def test_discover_as_json(capsys):
    argv = ["discover", "--task", "agreement", "--n", "36", "--sites", "z", "--attributes", "number", "--json"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == "" and found["settings"]["sites"] == ["z"]
    assert {(section["attribute"], section["site"]) for section in found["sections"]} == {("number", "z")}


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    argv = ["discover", "--task", "agreement", "--n", "36", "--sites", "z", "--out", str(tmp_path)]
    run = subprocess.Popen([*PROGRAM, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == (b"", 0)
    assert files_in(tmp_path) == [RECORD, "sections.csv"]


def screen(written):
    "What a terminal shows in the end of what was written to it."
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown = []
        for piece in line.split("\r"): shown[:len(piece)] = piece
        lines.append("".join(shown).rstrip())
    return [line for line in lines if line]


def test_ctrl_c_keeps_what_there_is_and_clears_the_screen(tmp_path):
    "A person watches, and stops after the first cross-section."
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    run = subprocess.Popen([*PROGRAM, "evaluate", *SMALL, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    written = io.BytesIO()

    def read():
        try:
            while piece := os.read(master, 4096): written.write(piece)
        except OSError: return  # the other end is closed
    reader = threading.Thread(target=read)
    reader.start()
    while not (tmp_path / "report.json").exists():
        assert run.poll() is None, written.getvalue().decode()
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    out = run.communicate()[0].decode()
    reader.join()
    text = written.getvalue().decode()
    assert run.returncode == 130
    assert "cross-sections:" in text and "evaluate:" in text, "progress was shown"
    kept = f"kept in {tmp_path}: sections.csv, the report of 1 of 2 cross-sections"
    assert screen(text) == [f"sage_nb: interrupted; {kept}"]
    assert "z@END" in out and "scorecard" not in out
    assert files_in(tmp_path) == UNFINISHED and no_parts(tmp_path)
    assert sage_nb.SageReport.load(tmp_path).settings["partial"] == "1 of 2 cross-sections"
