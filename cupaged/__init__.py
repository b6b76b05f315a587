"""cupaged: a standalone Llama runtime. `from cupaged import LLM, SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cupaged.errors import CheckpointError, CupagedError, DeviceError, FetchError, InvalidArgument, OutOfMemory
from cupaged.version import __version__

if TYPE_CHECKING:
    from cupaged.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
    from cupaged.llm import LLM, Stream
    from cupaged.model.sampling import SamplingParams

# Imported on first use, so that `import cupaged` costs milliseconds and `--help` does not load NumPy.
_LAZY = {
    "LLM": "cupaged.llm",
    "Stream": "cupaged.llm",
    "SamplingParams": "cupaged.model.sampling",
    "RequestOutput": "cupaged.engine.outputs",
    "CompletionOutput": "cupaged.engine.outputs",
    "RequestMetrics": "cupaged.engine.outputs",
}

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "CupagedError",
    "DeviceError",
    "FetchError",
    "InvalidArgument",
    "OutOfMemory",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Stream",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'cupaged' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
