"""Wrong command lines: exit status, one line that names thing, value and remedy, and nothing heavy imported for it."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sage_nb.lab.results import RECORD

ROW = {
    "prompt": "Today Mary saw John", "answer": " Mary", "distractor": " John", "attributes": {"name": "Mary"},
    "counterfactuals": {"name": {"prompt": "Today Anna saw John", "answer": " Anna", "value": "Anna"}},
    "held_out": False,
}
OTHER = {
    "prompt": "Today Anna saw John", "answer": " Anna", "distractor": " John", "attributes": {"name": "Anna"},
    "counterfactuals": {"name": {"prompt": "Today Mary saw John", "answer": " Mary", "value": "Mary"}},
    "held_out": False,
}


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    "Folders and files that wrong command lines speak of."
    at = tmp_path_factory.mktemp("cli")

    def file(name, content=""):
        path = at / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)
    (at / "latin.json").write_bytes('{"name": "Zoë"}'.encode("latin-1"))
    (at / "empty").mkdir()
    (at / "blocked" / "report.json").mkdir(parents=True)
    return SimpleNamespace(
        at=str(at), file=file("file.txt"), empty=f"{at}/empty", blocked=f"{at}/blocked", latin=f"{at}/latin.json",
        broken=file("broken.json", '{"name": "mine",\n "rows": [\n  {"prompt": "One",}]}'),
        a_list=file("list.json", [ROW]), no_rows=file("norows.json", {"name": "mine"}),
        texts=file("texts.json", {"rows": ["One two"]}), one=file("one.json", {"rows": [ROW]}),
        same=file("same.json", {"rows": [ROW | {"held_out": True}, ROW]}),
        no_answer=file("noanswer.json", {"rows": [ROW, {**OTHER, "answer": ""}]}),
        good=file("good.json", {"rows": [ROW, OTHER, ROW | {"prompt": "Today Mary saw Tom", "held_out": True}]}),
        strange=os.path.dirname(file("strange/table.csv")), full=os.path.dirname(file("full/sections.csv")),
        record=file(f"full/{RECORD}", {"discover": {"task": "ioi", "n": 384}}),
        sae=os.path.dirname(os.path.dirname(file("a/topk/layer/cfg.json", "{}"))),
        sae_again=os.path.dirname(os.path.dirname(file("b/topk/layer/cfg.json", "{}"))),
        board=os.path.dirname(os.path.dirname(file("board/cells/a.json"))), page=file("board/page.html"),
        half=os.path.dirname(file("half/shared")),
    )


ROWS = [  # (command line, with names of the fixtures in braces; exit status; part of its text)
    ("evalaute", 2, "there is no command 'evalaute' (has discover, evaluate, doctor, score, sweep, leaderboard): did "),
    ("leaderbord", 2, "did you mean leaderboard?"),
    ("fly", 2, "there is no command 'fly' (has discover, evaluate, doctor, score, sweep, leaderboard)\n"),
    ("--verison", 2, "there is no command '--verison'"),
    ("--help evaluate", 2, "there is no command '--help'"),
    ("discover --site q", 2, "there is no option '--site': did you mean --sites? (sage_nb discover --help"),
    ("discover --saes tiny-gpt2-res-topk", 2, "there is no option '--saes'"),
    ("discover --qk-fix", 2, "there is no option '--qk-fix': did you mean --no-qk-fix?"),
    ("evaluate --pdb", 2, "there is no option '--pdb'"),
    ("evaluate --o x", 2, "there is no option '--o'"),
    ("evaluate tiny-gpt2", 2, "'tiny-gpt2' belongs to no option"),
    ("doctor tiny-gpt2 tiny-gemma", 2, "'tiny-gemma' belongs to no option"),
    ("doctor --model tiny-gpt2", 2, "there is no option '--model'"),
    ("doctor --saes tiny-gpt2-res-topk", 2, "there is no option '--saes'"),
    ("evaluate --n", 2, "--n: expected one argument"),
    ("evaluate --n many", 2, "--n: 'many' is not a whole number"),
    ("evaluate --n 12.5", 2, "--n: '12.5' is not a whole number"),
    ("evaluate --n -3", 2, "--n: -3 is too small; at least 2"),
    ("evaluate --n 0", 2, "--n: 0 is too small; at least 2"),
    ("evaluate --n 1", 2, "--n: 1 is too small; at least 2"),
    ("evaluate --seed -1", 2, "--seed: -1 is too small; at least 0"),
    ("evaluate --seed=", 2, "--seed: '' is not a whole number"),
    ("evaluate --quiet=yes", 2, "--quiet: ignored explicit argument 'yes'"),
    ("evaluate --n 96 --n 384", 2, "--n is given twice"),
    ("evaluate --saes a --saes=b", 2, "--saes is given twice; several names go with commas"),
    ("evaluate --saes a,b,a", 2, "--saes: 'a' is named twice"),
    ("evaluate --saes=", 2, "--saes: an empty name"),
    ("evaluate --saes a,,b", 2, "--saes: an empty name"),
    ("evaluate --sites q,", 2, "--sites: an empty name"),
    ("evaluate --model=", 2, "--model: an empty name"),
    ("evaluate --out=", 2, "--out: an empty name"),
    ("discover --model tiny-gtp2", 1, "model 'tiny-gtp2' is neither embedded (tiny-gemma, tiny-gpt2, tiny-pythia)"),
    ("discover --model tiny-gtp2", 1, ": did you mean tiny-gpt2?"),
    ("discover --model gpt-2-small", 1, "others of the hub are called organisation/name"),
    ("doctor tiny-gtp2", 1, ": did you mean tiny-gpt2?"),
    ("doctor {empty}", 1, "holds no model: config.json is missing"),
    ("doctor {file}", 1, "file.txt' is a file: give the folder"),
    ("discover --model {empty}", 1, "holds no model: config.json is missing"),
    ("discover --model {file}", 1, "file.txt' is a file: give the folder"),
    ("discover --model ./nowhere", 1, "there is no folder './nowhere' with a model"),
    ("discover --task ioy", 1, "task 'ioy' is neither built in (has ioi, order"),
    ("discover --task ioy", 1, "did you mean ioi?"),
    ("discover --task {file}", 1, "nor a .json file"),
    ("discover --task {at}/nowhere.json", 1, "there is no task file"),
    ("discover --task {broken}", 1, "broken.json', line 3: "),
    ("discover --task {latin}", 1, "latin.json' is no text in UTF-8: save it as such"),
    ("discover --task {a_list}", 1, "list.json' has no rows: write {"),
    ("discover --task {no_rows}", 1, "norows.json' has no rows: write {"),
    ("discover --task {texts}", 1, "texts.json': row 0 is 'One two'; write {"),
    ("discover --task {one}", 1, "1 prompts; at least 2 are needed"),
    ("discover --task {same}", 1, "occurs 2 times"),
    ("discover --task {no_answer}", 1, "row 1: answer is ''; a text is needed"),
    ("discover --task {good} --n 96", 1, "--n says nothing about"),
    ("discover --task {good} --seed 0", 1, "whose prompts are its rows: leave it out"),
    ("discover --sites resid_per", 1, "--sites: 'resid_per' is not one of resid_pre, q, k, v, z"),
    ("discover --sites q,Z", 1, "--sites: 'Z' is not one of resid_pre, q, k, v, z"),
    ("discover --device gpu", 1, "--device 'gpu' is not one of cpu, cuda, cuda:0 and so on, mps"),
    ("doctor --device cuda:", 1, "--device 'cuda:' is not one of cpu, cuda, cuda:0"),
    ("discover --attributes Foo", 1, "--attributes: 'Foo' is not one of IO, S, Pos"),
    ("discover --attributes number", 1, "--attributes: 'number' is not one of IO, S, Pos"),
    ("discover --quiet", 1, "--quiet without --out or --json leaves nothing to see: add one"),
    ("evaluate --saes tiny-gpt2-res-topl", 1, "nor one of sae_lens' "),
    ("evaluate --saes tiny-gpt2-res-topl", 1, "did you mean tiny-gpt2-res-topk?"),
    ("evaluate --saes tiny-gpt2-res-topk,gpt2-small-res-bj", 1, "did you mean gpt2-small-res-jb?"),
    ("evaluate --saes {empty}", 1, "holds no SAE: there is no cfg.json in it"),
    ("evaluate --saes {file}", 1, "file.txt' are a file: give the folder"),
    ("evaluate --saes ./nowhere", 1, "there is no folder './nowhere' with SAEs"),
    ("evaluate --saes gpt2-small-res-jb", 1, "were made for gpt2-small, not for tiny-gpt2: --model gpt2-small"),
    ("evaluate --saes tiny-gemma-res-jumprelu", 1, "for tiny-gemma, not for tiny-gpt2; --force scores them anyway"),
    ("evaluate --saes {sae},{sae_again}", 1, "would both be called 'topk': rename a folder"),
    ("evaluate --out {file}", 1, "file.txt' is a file; give another folder"),
    ("evaluate --out {file}/deep/er", 1, "file.txt' is a file; give another folder"),
    ("evaluate --out /proc/results", 1, "'/proc' cannot be written to ("),
    ("evaluate --out {blocked} --overwrite", 1, "'report.json' in it stands in the way; give another folder"),
    ("evaluate --out {strange}", 1, f"table.csv of another origin ({RECORD} is missing); --overwrite replaces it"),
    ("evaluate --n 96 --out {full}", 1, "what sage_nb discover found with n 384, not 96; --overwrite replaces it"),
    ("discover --task order --out {full}", 1, "found with task ioi, not order, n 384, not 1024; --overwrite"),
    ("score --n many", 2, "--n: 'many' is not a whole number"),
    ("score --quiet", 1, "--quiet without --out or --json leaves nothing to see: add one"),
    ("score --saes tiny-gpt2-res-topl", 1, "did you mean tiny-gpt2-res-topk?"),
    ("score --out {file}", 1, "file.txt' is a file; give another folder"),
    ("score --out {strange}", 1, "--overwrite replaces it, or give another folder"),
    ("sweep --model tiny-gpt2", 2, "there is no option '--model': did you mean --models?"),
    ("sweep --seeds 0,1,0", 2, "--seeds: 0 is named twice"),
    ("sweep --seeds 0-3", 2, "--seeds: '0-3' is not a whole number"),
    ("sweep --seeds 0,-1", 2, "--seeds: -1 is too small; at least 0"),
    ("sweep --jobs 0", 2, "--jobs: 0 is too small; at least 1"),
    ("sweep --models tiny-gpt2,tiny-gtp2", 1, "did you mean tiny-gpt2?"),
    ("sweep --tasks ioi,ordr", 1, "task 'ordr' is neither built in"),
    ("sweep --tasks {good} --n 96", 1, "--n says nothing about"),
    ("sweep --tasks {good} --seeds 0", 1, "--seeds says nothing about"),
    ("sweep --tasks ioi,order --attributes IO", 1, "--attributes, of task 'order': 'IO' is not one of "),
    ("sweep --sites q,Z", 1, "--sites: 'Z' is not one of resid_pre, q, k, v, z"),
    ("sweep --saes tiny-gpt2-res-topk,gpt2-small-res-bj", 1, "did you mean gpt2-small-res-jb?"),
    ("sweep --saes re:gpt2(", 1, "'gpt2(' is no regular expression: missing )"),
    ("sweep --saes re:tiny-gpt3.*", 1, "none of sae_lens' "),
    ("sweep --saes re:tiny-gpt2", 1, "the whole name must match, so write '.*' where anything may stand"),
    ("sweep --saes re:tiny-gemma.*", 1, "were made for tiny-gemma, not for tiny-gpt2; --force scores them anyway"),
    ("sweep --saes gpt2-small-res-jb", 1, "were made for gpt2-small, not for tiny-gpt2: --models …,gpt2-small"),
    ("sweep --saes {at}/nowhere*", 1, "no folder with SAEs (a cfg.json in it) matches "),
    ("sweep --saes {at}/?/topk", 1, "would both be called 'topk': rename a folder"),
    ("sweep --backend lokee", 1, "backend 'lokee' is not one of loky, threading, dask, ray: did you mean loky?"),
    ("sweep --device cuda,cpu", 1, "--device 'cuda,cpu' is not one of cpu, cuda, cuda:0"),
    ("sweep --revision main", 1, "--revision main is for models of the hub, which 'tiny-gpt2' is not: leave it out"),
    ("sweep --out {file}", 1, "file.txt' is a file; give another folder"),
    ("sweep --out {half}", 1, "'shared' in it is a file; give another folder"),
    ("sweep --dry-run --quiet", 1, "--quiet with --dry-run leaves nothing to see: add --json"),
    ("leaderboard {at}/nowhere", 1, "nowhere' is not there: give the --out of a sage_nb sweep"),
    ("leaderboard {file}", 1, "file.txt' is a file: give the --out of a sage_nb sweep"),
    ("leaderboard {empty}", 1, "holds no results of a sweep: give the --out of a sage_nb sweep"),
    ("leaderboard {board} {board}", 2, "board' belongs to no option"),
    ("leaderboard --folder {board}", 2, "there is no option '--folder'"),
    ("leaderboard {board} --where task", 2, "--where: 'task' is not NAME=VALUE, such as task=ioi"),
    ("leaderboard {board} --where =ioi", 2, "--where: '=ioi' is not NAME=VALUE"),
    ("leaderboard {board} --where task=ioi,", 2, "--where: an empty name"),
    ("leaderboard {board} --csv --json", 1, "--csv and --json ask for two forms: give one of them"),
    ("leaderboard {board} --quiet", 1, "--quiet without --page or --json leaves nothing to see: add one"),
    ("leaderboard {board} --page page.pdf", 1, "--page 'page.pdf' is no HTML file: end its name in .html"),
    ("leaderboard {board} --page {file}/page.html", 1, "file.txt' is a file; give another folder"),
    ("leaderboard {board} --page /proc/page.html", 1, "'/proc' cannot be written to ("),
    ("leaderboard {board} --page {page}", 1, "page.html' exists; --overwrite replaces it, or give another file"),
]

SEVERAL = """
import contextlib, io, json, sys
from sage_nb.lab.cli import main
heavy = ["torch", "transformers", "transformer_lens", "sae_lens"]
for argv in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(argv)
    print(json.dumps([status, out.getvalue(), err.getvalue(), [name for name in heavy if name in sys.modules]]))"""


@pytest.fixture(scope="module")
def answers(fixtures):
    "What one process without torch says to all rows, one after the other."
    lines = [[word.format(**vars(fixtures)) for word in line.split()] for line, _, _ in ROWS]
    done = subprocess.run([sys.executable, "-c", SEVERAL], input=json.dumps(lines), capture_output=True, text=True,
                          cwd=fixtures.at, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[f"{line} | {text[:20]}" for line, _, text in ROWS])
def test_wrong_command_lines_are_refused_at_once(number, answers):
    _, expected, text = ROWS[number]
    status, out, err, heavy = answers[number]
    assert (status, out, heavy) == (expected, "", [])
    assert err.startswith("sage_nb: ") and err.count("\n") == 1 and err.endswith("\n")
    assert text in err


def test_a_refused_command_line_writes_nothing(fixtures, answers):
    "No folder was made, nothing that was there is gone."
    at = Path(fixtures.at)
    assert sorted(p.name for p in at.iterdir() if p.is_dir()) == [
        "a", "b", "blocked", "board", "empty", "full", "half", "strange"]
    assert sorted(p.name for p in (at / "full").iterdir()) == [RECORD, "sections.csv"]
    assert not list((at / "empty").iterdir())
