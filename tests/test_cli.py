"""The command line: exit status, messages and files."""
import subprocess
import sys

import pandas as pd
import pytest

from sage_nb.lab.cli import COMMANDS, main


def test_an_unknown_command_returns_1_and_shows_what_there_is(capsys):
    assert main(["nope"]) == 1
    out = capsys.readouterr().out
    assert "usage: sage_nb COMMAND" in out and all(name in out for name in COMMANDS)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], []])
def test_help_returns_0(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop: main([command, "--help"])
    assert stop.value.code == 0
    assert {"--model", "--task", "--n", "--seed", "--out"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("argv", [["--help"], ["evaluate", "--help"]])
def test_help_does_not_wait_for_torch(argv):
    program = f"""
import sys
from sage_nb.lab.cli import main
try: main({argv})
except SystemExit: pass
print(sorted({{"torch", "transformers", "sae_lens", "pandas"}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("argv,message", [
    (["discover", "--task", "nope"], "task 'nope' is not built in"),
    (["discover", "--n", "1"], "at least 2 are needed"),
    (["evaluate", "--task", "nope"], "task 'nope' is not built in"),
])
def test_a_users_error_returns_1_with_one_line(argv, message, capsys):
    assert main(argv) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("sage_nb: ") and message in err


def test_an_option_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit) as stop: main(["discover", "--n", "many"])
    assert stop.value.code == 2


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
