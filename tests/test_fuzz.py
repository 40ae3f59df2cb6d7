"""Every file that is read, with bytes and types that are wrong: the right value, or a ValueError or OSError that says
where; never another error, never nonsense for a number, and nothing of a file is ever run.
FUZZ_EXAMPLES=1000 tries that many of each; with other seeds, FUZZ_RANDOM=1."""
import copy
import hashlib
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import made_up_cells
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sage_nb.core.models import EMBEDDED
from sage_nb.lab import cells, results
from sage_nb.lab.sweeps import Ground, ground_bytes, ground_of_bytes
from sage_nb.measures.control import SKYLINE
from sage_nb.report.evaluation import evaluate
from sage_nb.report.report import SageReport
from sage_nb.saes.sets import load_saes
from sage_nb.tasks.items import items_from_rows, rows_from_frame
from sage_nb.tasks.task import load_task

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 60))


def fuzzed(examples=EXAMPLES):
    return settings(max_examples=examples, deadline=None, derandomize="FUZZ_RANDOM" not in os.environ, database=None,
                    suppress_health_check=[*HealthCheck], phases=[Phase.generate])  # an example is small as it is


DEEP = json.loads("[" * 400 + "]" * 400)
VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, -1, -7, 2, 10**30, -2**63, 2**63, 1e308, math.nan, math.inf, 0.5]),
    st.sampled_from(["0.5", "nan", "1e999", "", " ", "\x00", "é", "x" * 5000, "../../etc/passwd", "/etc/passwd",
                     "float64", "load", "strided", "quint8"]),
    st.sampled_from([[], {}, [[]], [1, 2, 3], [["a"], [2]], {"a": 1}, [None], DEEP]),
    st.integers(-3, 2000), st.floats(), st.text(max_size=5)).map(copy.deepcopy)


def paths_of(value, path=()):
    "Every place in some JSON."
    yield path
    if isinstance(value, dict): several = value.items()
    elif isinstance(value, list): several = enumerate(value[:20])
    else: return
    for key, inner in several: yield from paths_of(inner, (*path, key))


def altered(draw, record):
    "The same JSON with something foreign in one or two places, or something taken away."
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([*paths_of(record)]))
        if not path: return draw(VALUES)
        inner = record
        for key in path[:-1]: inner = inner[key]
        how = draw(st.integers(0, 4))
        if how == 0 and isinstance(inner, dict): del inner[path[-1]]
        elif how == 1 and isinstance(inner, list): inner.append(copy.deepcopy(inner[path[-1]]))
        elif how == 2 and isinstance(inner, dict): inner[draw(st.text(max_size=3))] = draw(VALUES)
        else: inner[path[-1]] = draw(VALUES)
    return record


def damaged(draw, content):
    "The same bytes, flipped, cut, repeated or pushed apart."
    at, how = draw(st.integers(0, max(0, len(content) - 1))), draw(st.integers(0, 5))
    if how == 0: return content[:at]
    if how == 1: return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1:]
    if how == 2: return content[:at] + content[at // 2:]
    if how == 3: return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    if how == 4: return b"[" * 100_000 + content
    return content.replace(b'": ', b'": -', 1 + at % 5) if at % 2 else content.replace(b'"', b'"schema":1,"', 1)


def head_changed(draw, content):
    "A safetensors file with something foreign in its head."
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8:8 + length])
    if draw(st.booleans()) and "__metadata__" in head:
        name = next(iter(head["__metadata__"]))
        inner = altered(draw, json.loads(head["__metadata__"][name]))
        head["__metadata__"][name] = json.dumps(inner)
    else: head = altered(draw, head)
    new = json.dumps(head).encode()
    return len(new).to_bytes(8, "little") + new + content[8 + length:]


def outcome(read, *says):
    "What reading gives, or None after an error that is a clear one."
    try: return read()
    except (ValueError, OSError) as error:
        text = str(error)
        assert any(word in text for word in says), f"which file? {text[:300]}"
        assert len(text) < 9000 and "Traceback" not in text
        return None


def finite_or_none(value): return value is None or not isinstance(value, (str, bool)) and math.isfinite(value)


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch):
    "torch.load is not reached, or only where it reads tensors alone."
    load = torch.load

    def checked(*args, **options):
        assert options.get("weights_only") is True, "torch.load of anything"
        return load(*args, **options)
    monkeypatch.setattr(torch, "load", checked)


# Cells and evidence

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with one cell."
    out = tmp_path_factory.mktemp("cells")
    made_up_cells.write_one(out, "a", 0.8)
    return out


@pytest.fixture(scope="module")
def a_cell(folder): return next((folder / "cells").iterdir())


def sealed(record):
    "A record with the checksum that it should have."
    record = {name: x for name, x in record.items() if name not in ("format", "schema", "sha256")}
    try: checksum = hashlib.sha256(cells.canonical(record).encode()).hexdigest()
    except ValueError: checksum = "none"
    return {"format": cells.FORMAT, "schema": cells.SCHEMA_OF_CELLS, "sha256": checksum} | record


def name_of(record):
    try: return cells.CellKey(**record["key"]).name
    except Exception: return "0" * 32  # it has none


@fuzzed()
@given(data=st.data())
def test_a_cell_with_other_bytes(folder, a_cell, data):
    content, good = a_cell.read_bytes(), cells.read_cell(a_cell)
    place = folder / "other" / a_cell.name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(damaged(data.draw, content))
    found = outcome(lambda: cells.read_cell(place), str(place))
    assert found is None or found == good


@fuzzed(2 * EXAMPLES)
@given(data=st.data())
def test_a_cell_with_foreign_values(folder, a_cell, data):
    "Someone wrote it so, checksum and name and all."
    record = altered(data.draw, json.loads(a_cell.read_text()))
    record = sealed(record) if isinstance(record, dict) else record
    name = name_of(record)
    place = folder / "sealed" / f"{name}.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(record))
    cell = outcome(lambda: cells.read_cell(place), str(place))
    if cell is None: return
    row = cell.row
    numbers = ("score", "score_lo", "score_hi", "margin", "margin_lo", "margin_hi", "passes", "seconds", "l0", "width")
    assert all(finite_or_none(row.get(x)) for x in numbers), {x: row.get(x) for x in numbers}
    pd.DataFrame([row]).to_json()
    outcome(lambda: cells.read_evidence(folder, cell), "evidence", str(folder))


@fuzzed()
@given(data=st.data())
def test_evidence_with_other_bytes_or_a_foreign_head(folder, a_cell, data):
    "Under the name that its bytes have, or under that of the right ones."
    cell = cells.read_cell(a_cell)
    content = (folder / "evidence" / f"{cell.evidence['a']}.safetensors").read_bytes()
    other = (head_changed if data.draw(st.booleans()) else damaged)(data.draw, content)
    place, name = folder / "changed" / "evidence", hashlib.sha256(other).hexdigest()[:32]
    if data.draw(st.integers(0, 4)) == 0: name = cell.evidence["a"]
    place.mkdir(exist_ok=True, parents=True)
    shutil.copy(folder / "evidence" / f"{cell.evidence[SKYLINE]}.safetensors", place)
    (place / f"{name}.safetensors").write_bytes(other)
    theirs = cells.replace(cell, evidence={**cell.evidence, "a": name})
    found = outcome(lambda: cells.read_evidence(place.parent, theirs), name, "cell")
    for e in found or []:
        assert all(x.dtype in (torch.float32, torch.float64) and len(x) == 40 for x in e.own.sparse)


# Ground truth, reports, records of commands

@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    "A ground truth and a report, saved."
    from sage_nb.discovery.sections import find_cross_sections
    from sage_nb.truth.dictionaries import fit_dictionaries
    task = load_task("ioi", model, n=96)
    sections = find_cross_sections(model, task, attributes=["IO"], sites=["v"], max_prompts=24, verbose=False)
    truth = fit_dictionaries(model, task, sections)
    saes = load_saes("tiny-gpt2-res-topk")
    report = evaluate(model, task, sections, truth, saes, tests=1, twins=False, progress=False)
    out = tmp_path_factory.mktemp("report")
    report.save(out, page=False)
    return ground_bytes(Ground(sections, truth)), out, report


@fuzzed()
@given(data=st.data())
def test_a_ground_truth(found, data):
    content, *_ = found
    other = (head_changed if data.draw(st.booleans()) else damaged)(data.draw, content)
    ground = outcome(lambda: ground_of_bytes(other), "discovery and ground truth")
    if ground is not None: assert ground.truth.digest == ground_of_bytes(content).truth.digest


@fuzzed(2 * EXAMPLES)
@given(data=st.data())
def test_a_report(found, data, tmp_path_factory):
    _, good, report = found
    place = good.parent / "other"
    shutil.copytree(good, place, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["report.json"] * 6 + ["evidence.safetensors", "explorers.json"]))
    if name == "report.json" and data.draw(st.integers(0, 3)):
        record = json.loads((good / name).read_text())
        some = data.draw(st.sampled_from(["", "scores", "table", "evidence"]))  # most of it is discovery
        other = record | {some: altered(data.draw, record[some])} if some else altered(data.draw, record)
        (place / name).write_text(json.dumps(other))
    else: (place / name).write_bytes(damaged(data.draw, (good / name).read_bytes()))
    other = outcome(lambda: SageReport.load(place), str(place))
    if other is None: return
    assert all(map(finite_or_none, other.scores["score"]))
    assert list(other.evidence) and all(len(e) for e in other.evidence.values()) or other.evidence == {}


@fuzzed()
@given(data=st.data())
def test_a_record_of_commands(data, tmp_path_factory):
    place = tmp_path_factory.getbasetemp() / "command"
    place.mkdir(exist_ok=True)
    (place / "report.json").write_text(json.dumps({"settings": {"task": "x"}}))
    record = {"evaluate": {"model": "tiny-gpt2", "saes": ["a", "b"], "n": 64}, "discover": {"model": "tiny-gpt2"}}
    if data.draw(st.booleans()): content = json.dumps(altered(data.draw, record)).encode()
    else: content = damaged(data.draw, json.dumps(record).encode())
    name = data.draw(st.sampled_from([results.RECORD, "report.json"]))
    (place / results.RECORD).write_text(json.dumps(record))
    (place / name).write_bytes(content)
    said = results.other_results(place, record["evaluate"])
    assert said is None or isinstance(said, str) and said
    results.Results(place, "evaluate", record["evaluate"])


# Tasks

ROWS = [{"prompt": f"{a} and {b} went to the park. {b} gave a ball to", "answer": f" {a}", "distractor": f" {b}",
         "attributes": {"IO": a}, "positions": {"name": [0, len(a)]}, "held_out": i > 2, "template": 0,
         "counterfactuals": {"IO": {"prompt": f"{c} and {b} went to the park. {b} gave a ball to", "answer": f" {c}",
                                    "value": c, "positions": {"name": [0, len(c)]}}}}
        for i, (a, b, c) in enumerate([("Mary", "John", "Anna"), ("Anna", "John", "Mary"), ("Mary", "Paul", "Anna"),
                                       ("Anna", "Paul", "Mary"), ("Mary", "Tom", "Anna"), ("Anna", "Tom", "Mary")])]


@fuzzed()
@given(data=st.data())
def test_a_task_file(model, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    record = {"name": "ours", "rows": ROWS}
    content = json.dumps(record).encode()
    if data.draw(st.integers(0, 2)): content = json.dumps(altered(data.draw, record)).encode()
    else: content = damaged(data.draw, content)
    path.write_bytes(content)
    task = outcome(lambda: load_task(path, model), "fuzzed", "task ")
    if task is not None: assert len(task) >= 2 and all(isinstance(text, str) for text in task.texts)


def test_the_task_is_one(model, tmp_path):
    (tmp_path / "good.json").write_text(json.dumps({"name": "ours", "rows": ROWS}))
    assert len(load_task(tmp_path / "good.json", model)) == len(ROWS)


@fuzzed()
@given(data=st.data())
def test_rows_and_tables(data):
    try: items_from_rows(altered(data.draw, ROWS))
    except (ValueError, TypeError) as error: assert str(error)
    frame = pd.DataFrame([{"prompt": row["prompt"], "answer": row["answer"], "distractor": row["distractor"],
                           "IO": row["attributes"]["IO"], "other": row["attributes"]["IO"]} for row in ROWS])
    columns = frame.to_dict(orient="list")
    columns[data.draw(st.sampled_from([*columns]))][data.draw(st.integers(0, 5))] = data.draw(VALUES)
    try: items_from_rows(rows_from_frame(pd.DataFrame(columns), ["IO"], {"IO": "other"}, {}))
    except (ValueError, TypeError) as error: assert str(error)


# SAEs

SAE = EMBEDDED / "saes" / "tiny-gpt2-res-topk" / "blocks.1.hook_resid_pre"


@fuzzed()
@given(data=st.data())
def test_saes_in_a_folder(data, tmp_path_factory):
    place = tmp_path_factory.getbasetemp() / "saes" / "one"
    shutil.copytree(SAE, place, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["cfg.json", "cfg.json", "sae_weights.safetensors"]))
    content = (SAE / name).read_bytes()
    if data.draw(st.integers(0, 3)) == 0: content = damaged(data.draw, content)
    elif name == "cfg.json": content = json.dumps(altered(data.draw, json.loads(content))).encode()
    else: content = head_changed(data.draw, content)
    (place / name).write_bytes(content)
    found = outcome(lambda: load_saes(place.parent), str(place), "SAE")
    for sae in found or []:
        assert sae.W_dec.ndim == 2 and sae.W_dec.isfinite().all()
        assert isinstance(sae.d_in, int) and sae.d_in == 128


class Payload:
    "What would run if it were unpickled."

    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_pickles_are_refused(folder, a_cell, tmp_path, model):
    "In the place of every file that is read."
    mark = tmp_path / "it ran"
    for protocol in (0, 2, 5):
        content = pickle.dumps(Payload(mark), protocol)
        (tmp_path / a_cell.name).write_bytes(content)
        with pytest.raises(cells.CellError): cells.read_cell(tmp_path / a_cell.name)
        with pytest.raises(cells.CellError): ground_of_bytes(content)
        (tmp_path / "task.json").write_bytes(content)
        with pytest.raises(ValueError, match="task.json"): load_task(tmp_path / "task.json", model)
        (tmp_path / "report.json").write_bytes(content)
        with pytest.raises(ValueError, match="report.json"): SageReport.load(tmp_path)
        for name in ("cfg.json", "sae_weights.safetensors"):
            place = shutil.copytree(SAE, tmp_path / f"{protocol} {name}")
            (place / name).write_bytes(content)
            with pytest.raises(ValueError, match=name): load_saes(place)
    assert not mark.exists()
