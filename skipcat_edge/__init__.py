"""skipcat-edge: low-rank language models for small devices.

What the commands do, from Python: `convert`, `inspect`, `bench`, `evaluate` and `plan` return dataclasses,
print nothing, and raise `UserError` for what a caller can mend. `set_level` turns a loaded model's speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipcat_edge.benchmark import bench
    from skipcat_edge.conversion import convert
    from skipcat_edge.errors import UserError
    from skipcat_edge.evaluation import evaluate
    from skipcat_edge.inspection import inspect
    from skipcat_edge.levels import set_level
    from skipcat_edge.planner import plan

__version__ = "0.1.0"
__all__ = ["UserError", "bench", "convert", "evaluate", "inspect", "plan", "set_level"]

_MODULES = {"UserError": "errors", "bench": "benchmark", "convert": "conversion", "evaluate": "evaluation",
            "inspect": "inspection", "plan": "planner", "set_level": "levels"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then: `skipcat-edge --help` should not wait for NumPy."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
