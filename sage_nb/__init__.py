"""Score sparse autoencoders of language models against ground-truth features of real tasks (SAGE)."""

__version__ = "0.1.0"

from importlib import import_module

# public name -> the room that it lives in, imported when it is first asked for: torch and its friends take seconds
_HOMES = {
    "Node": "core.activations", "load_model": "core.models", "doctor": "core.doctor", "Task": "tasks.task",
    "load_task": "tasks.task", "task_from_frame": "tasks.task", "task_from_json": "tasks.task",
    "task_from_rows": "tasks.task", "find_cross_sections": "discovery.sections",
    "fit_dictionaries": "truth.dictionaries", "SAESet": "saes.sets", "load_saes": "saes.sets",
    "certificate": "measures.certificate", "SageReport": "report.report", "evaluate": "report.evaluation",
    "validate_score": "report.validation", "score": "lab.sweeps", "sweep": "lab.sweeps",
    "leaderboard": "lab.leaderboard",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__(): return sorted({*globals(), *_HOMES})
