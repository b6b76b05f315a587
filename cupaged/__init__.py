"""cupaged: a standalone Llama runtime. `from cupaged import LLM, SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cupaged.errors import CheckpointError, CupagedError, DeviceError, FetchError, InvalidArgument, OutOfMemory
from cupaged.version import __version__

if TYPE_CHECKING:
    from cupaged.async_engine import AsyncEngine
    from cupaged.engine.beam_search import BeamSearchParams
    from cupaged.engine.outputs import CompletionOutput, EngineStats, Logprob, RequestMetrics, RequestOutput
    from cupaged.engine.speculative import NgramProposer
    from cupaged.llm import LLM, Stream
    from cupaged.model.sampling import SamplingParams

# Imported on first use, so that `import cupaged` costs milliseconds and `--help` does not load NumPy.
_LAZY = {
    "AsyncEngine": "cupaged.async_engine",
    "LLM": "cupaged.llm",
    "Stream": "cupaged.llm",
    "SamplingParams": "cupaged.model.sampling",
    "RequestOutput": "cupaged.engine.outputs",
    "CompletionOutput": "cupaged.engine.outputs",
    "RequestMetrics": "cupaged.engine.outputs",
    "EngineStats": "cupaged.engine.outputs",
    "Logprob": "cupaged.engine.outputs",
    "BeamSearchParams": "cupaged.engine.beam_search",
    "NgramProposer": "cupaged.engine.speculative",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CheckpointError",
    "CompletionOutput",
    "CupagedError",
    "DeviceError",
    "EngineStats",
    "FetchError",
    "InvalidArgument",
    "Logprob",
    "NgramProposer",
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
