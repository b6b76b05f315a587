"""Paged attention on its own: `plan` once a step, `run` once a layer."""

from cupaged.attention.merge import merge_states
from cupaged.attention.planner import Plan, plan

__all__ = ["Plan", "merge_states", "plan", "run"]


def __getattr__(name: str) -> object:
    if name == "run":  # brings CuPy
        from cupaged.attention.kernel import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
