"""Wrong calls of projections, measures and reports: each is refused by name, with the value and the remedy."""
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sage_nb.core.activations import Node
from sage_nb.core.sublayers import identity_errors
from sage_nb.measures.certificate import Criteria, certificate
from sage_nb.measures.control import control
from sage_nb.measures.diagnostics import keep_interpretable, oversplitting
from sage_nb.measures.edits import find_edits, read_latents
from sage_nb.measures.faithfulness import faithfulness
from sage_nb.measures.interpretability import interpret
from sage_nb.measures.activity import activity
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.report.evaluation import evaluate
from sage_nb.views.plots import plot_control, plot_discovery, plot_edits, plot_faithfulness
from sage_nb.report.report import SageReport
from sage_nb.saes.composition import composition, interactions
from sage_nb.saes.reconstruction import ProjectionSettings, decompose, reconstruct
from sage_nb.saes.sets import load_saes
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import fit_dictionaries
from sage_nb.truth.runs import set_up

QUICK = dict(tests=1, twins=False, progress=False)


@pytest.fixture(scope="session")
def f(model, tmp_path_factory):
    "One section of v, its ground truth, its bench, a report of it, and two folders: one saved, one damaged."
    task = load_task("ioi", model, n=96)
    sections = find_cross_sections(model, task, attributes=["IO"], sites=["v"], max_prompts=24, verbose=False)
    truth, saes = fit_dictionaries(model, task, sections), load_saes("tiny-gpt2-res-topk")
    bench = set_up(model, task, sections[0], truth)
    report = evaluate(model, task, sections, truth, saes, **QUICK)
    saved, damaged, other, older = (tmp_path_factory.mktemp(name) for name in ("saved", "damaged", "other", "older"))
    report.save(saved)
    report.save(damaged)
    (damaged / "report.json").write_text((damaged / "report.json").read_text()[:-20])
    report.save(other)
    (other / "evidence.safetensors").write_bytes((saved / "evidence.safetensors").read_bytes()[:-8])
    (older / "report.json").write_text((saved / "report.json").read_text().replace('"schema": 5', '"schema": 4'))
    names = interpret(activity(model, task.prompts, sections[0].nodes, saes), task.attributes, task.held_out)
    return SimpleNamespace(model=model, task=task, sections=sections, truth=truth, saes=saes, bench=bench, names=names,
                           report=report, saved=saved, damaged=damaged, other=other, older=older)


def run(f, *args, **options):
    "An evaluation with something wrong in it."
    wrong = dict(zip(("model", "task", "sections", "truth", "saes"), (f.model, f.task, f.sections, f.truth, f.saes)))
    wrong |= {name: options.pop(name) for name in list(options) if name in wrong}
    return evaluate(*wrong.values(), **(QUICK | options))


def moved(report, **settings): return replace(report, settings=report.settings | settings)


V, Z = "L3H2.v@IO", "L1H0.z@END"

ROWS = [  # (what, call, error, part of its text)
    # evaluate
    ("a model's name for a model", lambda f: run(f, model="tiny-gpt2"), TypeError, "load_model('tiny-gpt2')"),
    ("a task's name for a task", lambda f: run(f, task="ioi"), TypeError, "load it first: load_task('ioi'"),
    ("a list of sections", lambda f: run(f, sections=[*f.sections]), TypeError, "sections is list, not CrossSections"),
    ("truth and sections exchanged", lambda f: run(f, sections=f.truth, truth=f.sections), TypeError,
     "sections is Dictionaries, not CrossSections"),
    ("no truth", lambda f: run(f, truth=None),
     TypeError, "truth is NoneType, not Dictionaries: give what fit_dictionaries"),
    ("no section", lambda f: run(f, sections=replace(f.sections, sections=())),
     ValueError, "no cross-section to evaluate"),
    ("test 4", lambda f: run(f, tests=(4,)), ValueError, "tests=(4,) are not some of 1, 2, 3"),
    ("a test that is a word", lambda f: run(f, tests="all"), ValueError, "are not some of 1, 2, 3"),
    ("no moves", lambda f: run(f, ks=()), ValueError, "ks=() are not ascending numbers from 1"),
    ("0 moves", lambda f: run(f, ks=0), ValueError, "ks=(0,) are not ascending numbers from 1; give some, such as"),
    ("descending moves", lambda f: run(f, ks=(4, 2)), ValueError, "ks=(4, 2) are not ascending"),
    ("moves that are words", lambda f: run(f, ks="many"), ValueError, "are not ascending numbers from 1"),
    ("half a move", lambda f: run(f, ks=(0.5, 1)), ValueError, "ks=(0.5, 1) are not ascending"),
    ("a scale of another name", lambda f: run(f, scale="thawed"), ValueError, "scale 'thawed' is not one of frozen"),
    ("a pattern of another name", lambda f: run(f, pattern="true"), ValueError, "pattern 'true' is not one of frozen"),
    ("a route of another name", lambda f: run(f, route="up"), ValueError, "route 'up' is not one of read, write"),
    ("criteria that are a number", lambda f: run(f, criteria=0.5), TypeError, "criteria 0.5 are no Criteria: write"),
    ("batches of nothing", lambda f: run(f, batch_size=0), ValueError, "batch_size"),
    ("batches of less than nothing", lambda f: run(f, batch_size=-1), ValueError, "batch_size"),
    ("no SAEs", lambda f: run(f, saes=[]), ValueError, "there are no SAEs to evaluate: the list is empty"),
    ("a task for SAEs", lambda f: run(f, saes=f.task), TypeError, "SAEs"),
    ("SAEs and their names mixed", lambda f: run(f, saes=[next(iter(f.saes)), "tiny-gpt2-res-topk"]), TypeError,
     "the list mixes SAE objects with names or sets"),
    ("a set twice", lambda f: run(f, saes=[f.saes, f.saes]),
     ValueError, "several SAE sets are called 'tiny-gpt2-res-topk'"),
    ("a baseline's name", lambda f: run(f, saes=replace(f.saes, name="identity")), ValueError,
     "'identity', which is what a baseline is called here: give it another name"),
    ("PCA's name", lambda f: run(f, saes=replace(f.saes, name="PCA-4")),
     ValueError, "'PCA-4', which is what a baseline"),
    ("SAEs of another model", lambda f: run(f, saes=load_saes("tiny-pythia-res-batchtopk")), ValueError,
     "no SAEs are left to evaluate: tiny-pythia-res-batchtopk is refused"),
    ("an SAE set that misses a layer", lambda f: run(f, saes=load_saes({"L0.resid_pre": f.saes.before(0)})), ValueError,
     "no SAE of the residual stream before layer"),
    # criteria and certificates
    ("a negative tolerance", lambda f: Criteria(tolerance=-0.1), ValueError, "tolerance=-0.1 is below 0"),
    ("a negative share", lambda f: Criteria(max_off_target=-1), ValueError, "max_off_target=-1 is below 0"),
    ("too few prompts to prove anything", lambda f: Criteria(min_prompts=1), ValueError, "min_prompts=1 is below 2"),
    ("nothing to certify", lambda f: certificate(f.model, f.task, [], f.truth),
     ValueError, "there is nothing to certify"),
    # reports
    ("an SAE that was not tried", lambda f: f.report.compare("topk", "identity"), ValueError,
     "SAE 'topk' is not in the report (has mean ablation"),
    ("other prompts", lambda f: f.report.compare("identity", "identity", moved(f.report, task={"hash": "x"})),
     ValueError,
     "differ in prompts"),
    ("another ground truth",
     lambda f: f.report.compare("identity", "identity", moved(f.report, dictionaries={"hash": "x"})),
     ValueError, "differ in ground truth"),
    ("another version of the score",
     lambda f: f.report.compare("identity", "identity", moved(f.report, score_version=1)),
     ValueError, "differ in version of the score (2 against 1): evaluate both SAEs"),
    ("a report that does not say its version",
     lambda f: f.report.compare("identity", "identity", moved(f.report, score_version=None)),
     ValueError, "differ in version of the score (2 against null)"),
    ("a margin of what was not tried", lambda f: f.report.margin("topk"), ValueError,
     "SAE 'topk' is not in the report"),
    ("a margin without a baseline", lambda f: moved(f.report, baselines=[]).margin("identity"), ValueError,
     "there is no baseline to stand above: evaluate with some"),
    ("a report that does not say what it is of",
     lambda f: moved(f.report, task={}).compare("identity", "identity", moved(f.report, task={})), ValueError,
     "differ in prompts (null against null)"),
    ("a folder without a report", lambda f: SageReport.load("/nowhere"), FileNotFoundError, "report.json is missing"),
    ("a report that was cut off", lambda f: SageReport.load(f.damaged), ValueError, "report.json' is damaged"),
    ("evidence that was cut off", lambda f: SageReport.load(f.other),
     ValueError, "evidence.safetensors' is not the evidence"),
    ("a report of the last schema", lambda f: SageReport.load(f.older), ValueError,
     "has schema 4, this version reads 5: evaluate again with this version"),
    ("a folder with a report of the last schema", lambda f: f.report.save(f.older), FileExistsError,
     "holds a report that cannot be read"),
    ("a file for a folder", lambda f: f.report.save(f.saved / "table.csv"),
     NotADirectoryError, "is a file: name a folder"),
    ("a folder of another evaluation", lambda f: moved(f.report, tests=[1, 3]).save(f.saved), FileExistsError,
     "holds a report of ioi on tiny-gpt2, which this one would overwrite"),
    ("a file for SAEBench's folder", lambda f: f.report.save_saebench(f.saved / "table.csv"), NotADirectoryError,
     "is a file: name a folder"),
    # pictures
    ("a name for a table", lambda f: plot_faithfulness("results"), TypeError, "give a report, or its table"),
    ("a metric that is not there", lambda f: plot_edits(f.report, "surprise"),
     ValueError, "has a value for 'surprise'"),
    ("test 2 that was not run", lambda f: plot_control(f.report), ValueError, "has 'edit success' for any k"),
    ("an attribute that was not searched", lambda f: plot_discovery(f.sections, "Foo"), ValueError,
     "attribute 'Foo' was not searched (has IO)"),
    # measures
    ("a reconstruction of one node of two", lambda f: faithfulness(f.bench, {}),
     ValueError, "the reconstruction lacks"),
    ("no moves at all", lambda f: find_edits(f.bench, read_latents(f.bench, f.saes), k=0), ValueError,
     "k=0 moves exchange nothing"),
    ("counterfactuals that were not read",
     lambda f: find_edits(f.bench, read_latents(f.bench, f.saes, counterfactuals=False)), ValueError, "were not read"),
    ("moves that do not ascend", lambda f: control(f.bench, [f.saes], (2, 2)),
     ValueError, "ks=(2, 2) are not ascending"),
    ("two sets of one name", lambda f: control(f.bench, [f.saes, f.saes], 1), ValueError, "two SAE sets are called"),
    ("a word for projection settings", lambda f: control(f.bench, [f.saes], 1, settings="write"), TypeError,
     "settings 'write' are no ProjectionSettings"),
    ("thresholds that fall", lambda f: keep_interpretable(f.bench, f.saes, f.names, [0.5, 0.1]), ValueError,
     "thresholds [0.5, 0.1] do not rise"),
    ("no thresholds", lambda f: keep_interpretable(f.bench, f.saes, f.names, []),
     ValueError, "thresholds [] do not rise"),
    ("a rest of another name", lambda f: keep_interpretable(f.bench, f.saes, f.names, rest="median"), ValueError,
     "rest 'median' is not one of mean, zero"),
    ("an unknown attribute", lambda f: oversplitting(f.names, "Foo"), ValueError, "attribute 'Foo' is not one of IO"),
    ("a precision in per cent", lambda f: oversplitting(f.names, "IO", precision=90), ValueError,
     "precision=90 is no share of prompts"),
    # projection
    ("no nodes to project to", lambda f: decompose(f.model, f.task.prompts, [], f.saes),
     ValueError, "there are no nodes"),
    ("a node without a position", lambda f: decompose(f.model, f.task.prompts, ["L1H0.z"], f.saes), ValueError,
     "node L1H0.z cannot be projected to"),
    ("a node of all heads", lambda f: reconstruct(f.model, f.task.prompts, ["L1.z@END"], f.saes), ValueError,
     "node L1.z@END cannot be projected to: it must be one head"),
    ("a head that is not there", lambda f: reconstruct(f.model, f.task.prompts, ["L1H4.z@END"], f.saes), ValueError,
     "head 4 of node L1H4.z@END is not in this model (has 4)"),
    ("a layer that is not there", lambda f: reconstruct(f.model, f.task.prompts, ["L9H0.q@END"], f.saes), ValueError,
     "no SAE of the residual stream before layer 9"),
    ("a position that is not there", lambda f: reconstruct(f.model, f.task.prompts, ["L1H0.q@S3"], f.saes), ValueError,
     "position 'S3'"),
    ("a node that is no node", lambda f: reconstruct(f.model, f.task.prompts, ["head nine"], f.saes), ValueError,
     "node 'head nine' is not of the form"),
    ("a number for a node", lambda f: reconstruct(f.model, f.task.prompts, [9], f.saes), TypeError,
     "node 9 is neither a Node nor a text"),
    ("a route for the settings", lambda f: decompose(f.model, f.task.prompts, [Z], f.saes, "write"), TypeError,
     "settings 'write' are no ProjectionSettings"),
    ("a mode of another name", lambda f: ProjectionSettings(scale="true"),
     ValueError, "scale 'true' is not one of frozen"),
    ("a claim at a site without one", lambda f: identity_errors(f.model, f.task.prompts[:2], [("mlp", 0)]), ValueError,
     "nothing is claimed at site 'mlp'"),
    ("a query that is a value", lambda f: interactions(f.model, f.task, f.truth, Node.parse(V), Node.parse(V)),
     ValueError,
     "are not one head's q and k"),
    ("a writer behind its reader", lambda f: composition(f.model, f.task, f.truth, "L3H2.z@IO", "L1H0.v@IO", "IO"),
     ValueError, "L3H2.z@IO is not in an earlier layer than L1H0.v@IO"),
]


@pytest.mark.parametrize("what,call,error,text", ROWS, ids=[row[0] for row in ROWS])
def test_wrong_calls_are_refused(what, call, error, text, f):
    with pytest.raises(error) as caught: call(f)
    assert text in str(caught.value)


def test_a_report_is_read_from_its_file_too(f):
    assert SageReport.load(f.saved / "report.json").to_json() == f.report.to_json()


@pytest.mark.parametrize("tests,ks", [(1, 4), ((1,), (4,)), ([1], [4])])
def test_one_test_and_one_number_of_moves_need_no_brackets(f, tests, ks):
    settings = run(f, tests=tests, ks=ks).settings
    assert (settings["tests"], settings["ks"]) == ([1], [4])
