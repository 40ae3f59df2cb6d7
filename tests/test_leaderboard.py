"""The leaderboard against plain loops; results that must not be mixed; the hub, made up; SAEBench's own reader."""
import json
import math
import random
import shutil
import statistics
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from made_up_cells import made_up, write_many, write_one

from sage_nb.core.intervals import resample_counts
from sage_nb.lab.cells import cell_path, cells_in, compare_cells, read_cell, write_cell
from sage_nb.lab.leaderboard import (
    ALL_TASKS, comparisons, dataset_folder, leaderboard, leaderboard_explorer, pull_results, push_results,
    save_saebench)
from sage_nb.report.many import LEVEL, Scores, adjusted, differences, pareto_front, strictest

QUALITIES = {"A": 0.8, "B": 0.6, "C": 0.58, "D": 0.1}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Four SAEs on two tasks with two seeds; D has but one seed of the second."
    folder = tmp_path_factory.mktemp("results")
    for i, (name, quality) in enumerate(QUALITIES.items()):
        for task in ("ioi", "order"):
            for seed in (0, 1):
                if (name, task, seed) != ("D", "order", 1): write_one(folder, name, quality, task, seed, l0=4.0 + i)
    return folder


def by_key(folder): return {(c.key.sae, c.key.task, c.key.seed): c for c in cells_in(folder).cells}


# Numbers

def test_the_table_is_what_a_plain_loop_makes_of_the_files(results):
    cells, table = by_key(results), leaderboard(results).set_index(["sae", "task"])
    for name in QUALITIES:
        for task in ("ioi", "order"):
            own = [cells[name, task, seed] for seed in (0, 1) if (name, task, seed) in cells]
            scores = [c.methods[0]["score"] for c in own]
            below = [s - c.methods[0]["score_lo"] for s, c in zip(scores, own)]
            above = [c.methods[0]["score_hi"] - s for s, c in zip(scores, own)]
            within = statistics.mean([b * b / 2 + a * a / 2 for a, b in zip(above, below)]) / 1.96**2
            factor = math.sqrt(max(1, statistics.variance(scores) / within)) if len(own) > 1 else 1
            row, n = table.loc[(name, task)], len(own)
            assert row.score == pytest.approx(statistics.mean(scores)) and row.seeds == n and row.n == 80
            assert row.lo == pytest.approx(max(0, row.score - factor * math.sqrt(sum(b * b for b in below)) / n))
            assert row.hi == pytest.approx(min(1, row.score + factor * math.sqrt(sum(a * a for a in above)) / n))
            assert row.margin == pytest.approx(row.score - 0.3) and row.width == 512 and row.passes == 40


def test_pairs_are_those_of_two_cells(results):
    cells = by_key(results)
    found = comparisons(results, {"seed": 0, "task": "ioi"})
    assert len(found) == 6
    for row in found.itertuples():
        expected = compare_cells(results, cells[row.a, "ioi", 0], cells[row.b, "ioi", 0]).difference
        assert (row.difference, row.lo, row.hi) == pytest.approx(expected[:3])
        assert (row.p < 0.05) == expected.excludes_zero


def test_what_lacks_a_seed_is_not_compared_on_fewer_prompts_than_the_others(results):
    found = comparisons(results)
    at = {task: set(rows.a) | set(rows.b) for task, rows in found.groupby("task")}
    assert at == {"ioi": set("ABCD"), "order": set("ABC"), ALL_TASKS: set("ABC")}
    assert set(found.seeds) == {2}


def test_correction_is_benjamini_and_yekutielis():
    p = sorted(np.random.default_rng(0).uniform(0, 0.2, 40) ** 2)
    harmonic, least, expected = sum(1 / i for i in range(1, 41)), 1.0, []
    for rank in range(40, 0, -1):
        least = min(least, p[rank - 1] * 40 * harmonic / rank)
        expected.insert(0, least)
    assert adjusted(p).tolist() == pytest.approx(expected)
    n_real = int((adjusted(p) < LEVEL).sum())
    assert 0 < n_real < 40 and p[n_real - 1] < strictest(40, n_real) and p[n_real] >= strictest(40, n_real + 1)


def test_pairs_are_corrected_for_those_that_were_not_asked_for(results):
    every = comparisons(results).set_index(["task", "a", "b"])
    some = comparisons(results, saes=["A", "B"]).set_index(["task", "a", "b"])
    for key, row in some.iterrows():
        assert row.p == pytest.approx(every.loc[key].p)
        assert row.adjusted >= every.loc[key].adjusted - 1e-12, "asking for few must not make more real"


def test_two_tasks_with_the_same_prompts_count_are_resampled_apart():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    drawn = (resample_counts(50) @ x / 50)[None]
    alike = Scores(("a", "b"), x.mean(0)[None], drawn, 50)
    assert differences([alike, alike]).se[0] == pytest.approx(differences(alike).se[0]), "the same resamples twice"
    evidence = {name: [made_up(q, i)] for i, (name, q) in enumerate(QUALITIES.items())}
    one, two = (Scores.of(evidence, key) for key in "xy")
    assert differences([one, two]).se.mean() == pytest.approx(differences(one).se.mean() / 2**0.5, rel=0.05)


def test_the_front_has_none_that_is_beaten_and_all_others_are():
    rng = random.Random(1)
    for _ in range(50):
        points = [(rng.choice([1, 2, 4, 8, 9.5]), rng.choice([0, 0.1, 0.5, 0.9])) for _ in range(rng.randrange(12))]
        front = pareto_front([l0 for l0, _ in points], [score for _, score in points])
        for mine, is_front in zip(points, front):
            assert is_front != any(o[0] <= mine[0] and o[1] >= mine[1] and o != mine for o in points)


def test_the_page_says_what_the_table_and_the_pairs_say(results):
    page, table, pairs = leaderboard_explorer(results), leaderboard(results), comparisons(results)
    board, = page.data["boards"]
    names, tasks = [sae["name"] for sae in board["saes"]], [task["name"] for task in board["tasks"]]
    for row in table.itertuples():
        cell = board["cells"][names.index(row.sae)][tasks.index(row.task)]
        assert cell["numbers"][0] == pytest.approx([row.score, row.lo, row.hi], abs=1e-3) and cell["l0"] == row.l0
    for t, task in enumerate(tasks):
        mine = pairs[pairs.task == task]
        assert board["tasks"][t]["real"] == mine.real.sum() and board["tasks"][t]["compared"] == len(mine)
        shown = {(names[i], names[j]): d for i, j, d, *_ in board["pairs"][t]}
        assert shown == {(row.a, row.b): pytest.approx(row.difference, abs=1e-3) for row in mine.itertuples()}
    assert board["family"] == 6 + 6 + 6 and board["cells"][names.index("D")][0] is not None


def test_hundreds_of_saes_fit_on_a_page(tmp_path):
    write_many(tmp_path, 900)
    with pytest.raises(ValueError, match="has no evidence on"): leaderboard_explorer(tmp_path)
    board = leaderboard_explorer(tmp_path, compared=0).data["boards"][0]
    assert len(board["saes"]) == 300 and board["pairs"] == [[], [], [], []] and board["compared"] == 0


# Never mixed

@pytest.mark.parametrize("other, said", [
    (dict(score_version=1), "differ in score_version"), (dict(version="0.0.9"), "differ in version"),
    (dict(settings={"n": 80, "tests": [1]}), "differ in settings.tests"),
    (dict(dtype="torch.float16"), "differ in dtype"),
    (dict(flags={"prepend_bos": False}), "differ in flags.prepend_bos"),
    (dict(truth="another"), "differ in ground_truth"),
    (dict(task_hash="another"), "differ in task_hash"), (dict(model_hash="another"), "differ in model_hash")])
def test_results_of_different_kinds_are_refused_with_what_differs_and_can_be_chosen(tmp_path, other, said):
    write_one(tmp_path, "A", 0.5)
    write_one(tmp_path, "B", 0.5, **other)
    with pytest.raises(ValueError, match=said) as error: leaderboard(tmp_path)
    for function in (comparisons, leaderboard_explorer):
        with pytest.raises(ValueError, match=said): function(tmp_path)
    remedy = eval(str(error.value).partition("where=")[2])  # what the error says to do
    assert len(leaderboard(tmp_path, remedy)) == 1


def test_two_files_of_one_sae_under_one_name_are_refused(tmp_path):
    write_one(tmp_path, "A", 0.5)
    write_one(tmp_path, "A", 0.7, sae_hash="other weights")
    with pytest.raises(ValueError, match="of model tiny, sae A differ in sae_hash"): leaderboard(tmp_path)
    assert len(leaderboard(tmp_path, {"sae_hash": "other weights"})) == 1


def test_models_and_tasks_may_differ_in_all_that_is_their_own(tmp_path):
    for model in ("tiny", "large"): write_one(tmp_path, "A", 0.5, model=model, sae_hash=f"A of {model}")
    write_one(tmp_path, "A", 0.5, "order", sae_hash="A of tiny", n=200)
    found = leaderboard(tmp_path)[["model", "task"]].values.tolist()
    assert found == [["large", "ioi"], ["tiny", "ioi"], ["tiny", "order"]]


def test_seeds_of_other_pools_or_rows_of_ones_own_are_not_seeds_of_one_task(tmp_path):
    write_one(tmp_path, "A", 0.5, seed=0)
    other = read_cell(write_one(tmp_path / "other", "A", 0.7, seed=1))
    task = other.settings["task"] | {"pool": "unseen"}
    write_cell(tmp_path, replace(other, settings=other.settings | {"task": task}))
    with pytest.raises(ValueError, match="of model tiny, task ioi differ in pool"): leaderboard(tmp_path)
    assert leaderboard(tmp_path, {"pool": "unseen"}).seeds.tolist() == [1]


def test_over_seeds_the_worst_fit_is_shown(tmp_path):
    for seed, fit in enumerate(("good", "refused, forced", "doubtful")):
        cell = read_cell(write_one(tmp_path / "one", "A", 0.5, seed=seed))
        write_cell(tmp_path, replace(cell, fit=fit))
    assert leaderboard(tmp_path).fit.tolist() == ["refused, forced"]


def test_a_condition_in_words_is_refused(results):
    with pytest.raises(TypeError, match="where='task=ioi' is no dict: write {'task': 'ioi'}"):
        leaderboard(results, where="task=ioi")


# The hub, made up

class Hub:
    "Stands in for the hub: datasets are folders."
    def __init__(self, root): self.root, self.made = Path(root), []

    def create_repo(self, repo, repo_type, private, exist_ok):
        assert repo_type == "dataset" and exist_ok
        self.made.append((repo, private))
        (self.root / repo).mkdir(parents=True, exist_ok=True)
        return f"hub:{repo}"

    def upload_folder(self, repo_id, repo_type, folder_path, commit_message):
        assert repo_type == "dataset" and commit_message
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def download(self, repo, repo_type, revision, local_dir, allow_patterns):
        assert repo_type == "dataset"
        for path in (self.root / repo).rglob("*"):
            name = path.relative_to(self.root / repo).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, Path(local_dir) / name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    made_up_hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made_up_hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made_up_hub.download)
    return made_up_hub


def test_what_is_pushed_is_pulled_with_its_evidence(results, hub, tmp_path):
    assert push_results(results, "me/scores", {"task": "ioi"}) == "hub:me/scores" and hub.made == [("me/scores", True)]
    pulled = pull_results("me/scores", tmp_path / "pulled")
    assert leaderboard(pulled).equals(leaderboard(results, {"task": "ioi"}))
    assert comparisons(pulled).equals(comparisons(results, {"task": "ioi"}))
    push_results(results, "me/scores", {"task": "order"}, private=False)
    assert len(cells_in(pull_results("me/scores", pulled)).cells) == 15, "another push takes nothing away"


def test_the_card_shows_the_table_and_holds_no_markup(tmp_path):
    write_one(tmp_path / "results", "A](http://evil)<script>", 0.5, "task\n---\nlicense: x")
    out = dataset_folder(tmp_path / "results", tmp_path / "out")
    head, _, text = (out / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    assert "data_files: leaderboard.csv" in head and "<script>" not in text and "\n---" not in text
    assert (out / "leaderboard.csv").read_text().startswith("sae,model,task,score,lo,hi,margin")


def test_a_dataset_of_something_else_is_refused(hub, tmp_path):
    (hub.root / "me/other/cells").mkdir(parents=True)
    with pytest.raises(ValueError, match="'me/other' holds no results of a sweep"):
        pull_results("me/other", tmp_path / "a")
    (hub.root / "me/other/cells" / f"{'0' * 32}.json").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="is damaged"): pull_results("me/other", tmp_path / "b")


def test_a_file_that_was_changed_on_the_hub_is_told_of_and_not_used(results, hub, tmp_path):
    push_results(results, "me/scores", {"task": "ioi", "seed": 0})
    path = next((hub.root / "me/scores/cells").iterdir())
    path.write_text(path.read_text().replace('"score": 0.', '"score": 0.9'))
    with pytest.warns(UserWarning, match="1 files are no results"):
        pulled = pull_results("me/scores", tmp_path / "pulled")
    with pytest.warns(UserWarning, match="1 of 4 files are left out"): table = leaderboard(pulled)
    assert len(table) == 3


# SAEBench

def test_no_task_and_no_seed_writes_over_another(results, tmp_path):
    paths = save_saebench(results, tmp_path / "core")
    assert len(set(paths)) == len(list((tmp_path / "core").iterdir())) == 15
    assert all(task in path.name for path, task in zip(paths, [c.key.task for c in cells_in(results).cells]))
    write_one(tmp_path / "odd", "a b", 0.5)
    write_one(tmp_path / "odd", "a-b", 0.6)
    assert len({path.name for path in save_saebench(tmp_path / "odd", tmp_path / "odd out")}) == 2


def test_saebench_reads_them_with_its_own_package(results, tmp_path):
    tools = pytest.importorskip("sae_bench.sae_bench_utils.graphing_utils", reason="sae-bench is not installed")
    save_saebench(results, tmp_path / "core", {"seed": 0})
    files = tools.find_eval_results_files([str(tmp_path / "core")])
    read, core = tools.get_eval_results(files), tools.get_core_results(files)
    assert len(read) == len(core) == 8
    table = leaderboard(results, {"seed": 0}).set_index(["sae", "task"])
    for name, found in read.items():
        sae, task = name.split("_custom_sae_tiny_")[0], found["eval_config"]["task"]["name"]
        row = table.loc[(sae, task)]
        assert found["score"] == pytest.approx(row.score) and core[name]["l0"] == row.l0
        assert found["sae_class"] == "topk" and found["d_sae"] == "1k"


# Odd files

def test_a_file_under_anothers_name_is_left_out(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    one, two = sorted((tmp_path / "copy/cells").iterdir())[:2]
    shutil.copy(one, two)
    with pytest.warns(UserWarning, match="1 of 15 files are left out"): leaderboard(tmp_path / "copy")


def test_evidence_that_is_missing_is_an_error_with_a_remedy(tmp_path):
    for name in "AB": write_one(tmp_path, name, 0.5)
    shutil.rmtree(tmp_path / "evidence")
    assert len(leaderboard(tmp_path)) == 2, "the table needs none"
    with pytest.raises(ValueError, match="is missing: copy the folder whole"): comparisons(tmp_path)


def test_numbers_that_were_not_measured_are_missing_and_nothing_breaks(tmp_path):
    path = write_one(tmp_path, "A", 0.5)
    cell = read_cell(path)
    path.unlink()
    own = {name: value for name, value in cell.methods[0].items() if "control" not in name}
    bare = replace(cell, about={}, cost={}, margin={}, methods=(own,))
    write_cell(tmp_path, replace(bare, evidence={}))
    row = leaderboard(tmp_path).iloc[0]
    assert math.isnan(row.l0) and math.isnan(row.margin) and "control" not in row
    assert cell_path(tmp_path, cell.key).exists()
    assert json.loads(leaderboard(tmp_path).to_json(orient="records"))[0]["l0"] is None
