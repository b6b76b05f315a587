"""Where the time of one decode step goes, by kind of operation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cupaged.errors import CupagedError

if TYPE_CHECKING:
    from cupaged.llm import LLM

# operation -> what it counts as in a step; a product counts with the norm, SwiGLU or sum that is in its operation, and the one
# that gives the logits is a kind of its own
KINDS = {
    "norm_linear": "linear",
    "norm_swiglu": "linear",
    "linear_add": "linear",
    "paged_attention": "attention",
    "rope_append": "rope and append",
    "embedding": "embedding and copies",
    "index": "embedding and copies",
    "upload": "embedding and copies",
    "sample": "sampling",
    "download": "sampling",
    "check": "sampling",
}
LOGITS, OUTSIDE = "logits", "outside the operations"


def decode_step(llm: LLM, token_ids: list[int], tokens: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step that decodes one token, and of each kind of operation in it: together they are the step.

    One request is decoded: `tokens` after `token_ids`. Every other step has its operations timed call by call, those between
    run as always, so that both see the same lengths and the same machine. The step is the median of the latter. A kind is the
    median, over the former, of the sum of its calls; OUTSIDE is what they leave of the step: Python between the calls,
    scheduling, text. What the timing itself takes lies between the calls, on a GPU in part within them. Where that or noise
    makes the kinds more than the step, they are scaled down to it and OUTSIDE is 0. The graphs of a Decoder cannot be taken
    apart: it is left out of all these steps.
    """
    from cupaged import SamplingParams

    model = llm.engine.model
    ops, decoder, steps, timed = model.ops, model.decoder, [], []
    request = llm.add({"prompt_token_ids": token_ids}, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    model.decoder = None
    try:
        while not request.finished:
            decodes = request.metrics.num_generated_tokens > 0
            recorder = _Recorder(ops, llm.device) if decodes and len(steps) > len(timed) else None
            model.ops = recorder or ops
            start = time.perf_counter()
            llm.step()
            if recorder is not None:
                timed.append(recorder.milliseconds())
            elif decodes:
                steps.append(1e3 * (time.perf_counter() - start))
    finally:
        model.ops, model.decoder = ops, decoder
    if request.error is not None:
        raise CupagedError(request.error)
    step = statistics.median(steps)
    kinds = {kind: statistics.median(each[kind] for each in timed) for kind in timed[0]}
    scale = min(1.0, step / sum(kinds.values()))
    kinds = {kind: ms * scale for kind, ms in kinds.items()}
    return step, {**kinds, OUTSIDE: max(step - sum(kinds.values()), 0.0)}


class _Recorder:
    """Stands in for the ops module of a model and notes when each operation of KINDS began and ended.

    On the CPU by the clock; on a GPU by events on the stream around the call, read once the step is over. The time between
    those is the device's, and the host's where the device waits for what the call is to launch.
    """

    def __init__(self, ops: ModuleType, device: str) -> None:
        self._ops, self._cupy = ops, None
        if device != "cpu":
            import cupy

            self._cupy = cupy
        self._calls: list[tuple[str, Any, Any]] = []  # kind, marks before and after
        for name, kind in KINDS.items():
            setattr(self, name, self._noting(getattr(ops, name), kind))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def _noting(self, operation: Callable, kind: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self._mark()
            result = operation(*args, **kwargs)
            self._calls.append((LOGITS if "dtype" in kwargs and kind == "linear" else kind, before, self._mark()))
            return result

        return call

    def _mark(self) -> Any:
        if self._cupy is None:
            return time.perf_counter()
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """Of all calls so far, by kind."""
        sums = dict.fromkeys((KINDS["norm_linear"], LOGITS, *KINDS.values()), 0.0)  # what reads weights first
        if self._cupy is not None:
            self._calls[-1][-1].synchronize()
        for kind, before, after in self._calls:
            sums[kind] += self._cupy.cuda.get_elapsed_time(before, after) if self._cupy else 1e3 * (after - before)
        return sums
