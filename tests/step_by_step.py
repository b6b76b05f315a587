"""Decoding as it is defined, over `LLM.logits` of everything so far: no batch, no pool that is shared, nothing kept.

The logits come from a model of its own with room for all; what makes a token of them is written here, but for the draw itself,
which `cupaged.ops.numpy.sample` defines.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cupaged import LLM, SamplingParams
from cupaged.ops import numpy as ops

NEAR_TIE = 1e-3  # of logits: less than this moves them where they are computed in another order, and a token may change


@dataclass
class Plain:
    """What a request gives alone."""

    token_ids: list[int]
    finish_reason: str
    stop_reason: int | None
    num_certain: int  # tokens before the first that a change of the logits by NEAR_TIE would change

    def assert_equal(self, token_ids: list[int], finish_reason: str | None = None) -> None:
        """The same tokens, as far as they are certain."""
        certain = self.num_certain
        assert list(token_ids[:certain]) == self.token_ids[:certain]
        if certain == len(self.token_ids):
            assert len(token_ids) == certain
            assert finish_reason in (None, self.finish_reason)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def changed(
    logits: np.ndarray, prompt: list[int], output: list[int], params: SamplingParams, eos: Collection[int]
) -> np.ndarray:
    """A row of logits after processors, penalties, logit_bias and min_tokens, in this order."""
    row = np.array(logits, np.float32)
    for processor in params.logits_processors:
        row = np.array(processor(list(output), row), np.float32)
    for token in {*prompt, *output}:
        row[token] = row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
        if token in output:
            row[token] -= params.presence_penalty + output.count(token) * params.frequency_penalty
    for token, value in (params.logit_bias or {}).items():
        row[token] += np.float32(value)
    if len(output) < params.min_tokens:
        row[[*eos, *params.stop_token_ids]] = -np.inf
    return row


def draw(row: np.ndarray, params: SamplingParams, candidate: int, position: int) -> tuple[int, bool]:
    """The token at `position` from its changed logits, and whether it is drawn however they move by NEAR_TIE."""

    def drawn(row: np.ndarray) -> int:
        floats = [np.float32([x]) for x in (params.temperature, params.top_p, params.min_p)]
        temperature, top_p, min_p = floats
        whole = [np.int32([x]) for x in (params.top_k, candidate, position)]
        top_k, candidates, positions = whole
        seed = np.array([(params.seed or 0) % 2**64], np.uint64)
        return int(ops.sample(row[None], temperature, top_k, top_p, min_p, seed, candidates, positions)[0])

    token = drawn(row)
    lower = row.copy()
    lower[token] -= np.float32(NEAR_TIE)
    return token, drawn(lower) == token


def complete(llm: LLM, prompt: list[int], params: SamplingParams, candidate: int = 0) -> Plain:
    """What candidate number `candidate` of a request must give; stop strings aside. A request that draws needs a seed."""
    eos = llm.engine.eos_token_ids
    room = llm.max_model_len - len(prompt)
    most = room if params.max_tokens is None else min(room, params.max_tokens)
    output: list[int] = []
    num_certain = None
    while True:
        row = changed(llm.logits([*prompt, *output])[-1], prompt, output, params, eos)
        token, certain = draw(row, params, candidate, len(prompt) + len(output))
        if not certain and num_certain is None:
            num_certain = len(output)
        output.append(token)
        reason, stop_reason = None, None
        if token in params.stop_token_ids:
            reason, stop_reason = "stop", token
        elif token in eos and not params.ignore_eos:
            reason = "stop"
        elif len(output) == most:
            reason = "length"
        if reason:
            return Plain(output, reason, stop_reason, len(output) if num_certain is None else num_certain)


def beams(
    llm: LLM, prompt: list[int], width: int, max_tokens: int, length_penalty: float, ignore_eos: bool
) -> tuple[list[tuple[float, list[int]]], float]:
    """What beam search must give, (sum of log-probabilities, token ids) best first; and the least lead that decided it."""
    eos = () if ignore_eos else llm.engine.eos_token_ids
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    leads = [np.inf]

    def lead(values: list[float], kept: int) -> None:
        if len(values) > kept:
            leads.append(values[kept - 1] - values[kept])

    for _ in range(min(max_tokens, llm.max_model_len - len(prompt))):
        longer = []
        for total, output in alive:
            row = log_softmax(llm.logits([*prompt, *output])[-1])
            order = np.argsort(-row)
            lead(row[order].tolist(), 2 * width)
            longer += [(total + row[token], [*output, int(token)]) for token in order[: 2 * width]]
        longer.sort(key=lambda beam: -beam[0])
        ended += [beam for beam in longer if beam[1][-1] in eos]
        alive = [beam for beam in longer if beam[1][-1] not in eos]
        lead([total for total, _ in alive], width)
        alive = alive[:width]

    def worth(beam: tuple[float, list[int]]) -> float:
        total, output = beam
        return total / max(1, len(output) - (output[-1] in eos)) ** length_penalty

    found = sorted([*ended, *alive], key=worth, reverse=True)
    worths = [worth(beam) for beam in found]
    leads += [better - worse for better, worse in pairwise(worths[: width + 1])]
    return found[:width], float(min(leads))
