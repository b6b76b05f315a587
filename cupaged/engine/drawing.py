"""From the logits of a step to tokens and log-probabilities, of all completions together."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from cupaged.engine.completion import Completion
from cupaged.model.sampling import SamplingRow, Score, sample, score


@dataclass
class Work:
    """What a completion has in a step: tokens to compute, and positions whose logits it wants."""

    completion: Completion
    count: int
    draws: list[int]  # to draw the next token from: the last known one's, then those of the draft; or one for each sibling
    prompt: list[int]  # for prompt_logprobs


def draw(ops: ModuleType, logits: np.ndarray, work: list[Work]) -> tuple[list[int], dict[int, Score]]:
    """A token for each of `draws`, and the scores of the rows that want them, those of `prompt` too, by row.

    `logits` is a float32 [R, vocab] device array, its first rows those of all `draws` in order, then those of `prompt`; it is
    overwritten. What a logits processor raises is left in `Completion.failure`.
    """
    rows: list[SamplingRow] = []
    scored: list[int] = []
    count = 0  # of the most probable tokens that some row wants
    for item in work:
        completion, wanted = item.completion, item.completion.params.logprobs
        if wanted is not None:
            scored += range(len(rows), len(rows) + len(item.draws))
            count = max(count, wanted)
        for index, position in enumerate(item.draws):
            ahead = position - item.draws[0]
            sibling = completion.siblings[index - 1] if index and not ahead else None
            rows.append(completion.sampling_row(completion.seq.draft[:ahead], sibling))
    targets: list[int] = []
    for item in work:
        if item.prompt:
            first = len(rows) + len(targets)
            scored += range(first, first + len(item.prompt))
            targets += [item.completion.request.prompt_token_ids[position + 1] for position in item.prompt]
            count = max(count, item.completion.params.prompt_logprobs)
    raw = ops.embedding(ops.upload(np.array(scored, np.int32)), logits) if scored else None  # before anything changes them
    _process(ops, logits, work, rows)
    tokens = sample(ops, logits[: len(rows)], rows) if rows else []
    if not scored:
        return tokens, {}
    known = [*tokens, *targets]
    return tokens, dict(zip(scored, score(ops, raw, [known[row] for row in scored], count), strict=True))


def _process(ops: ModuleType, logits: np.ndarray, work: list[Work], sampled: list[SamplingRow]) -> None:
    row = 0
    for item in work:
        rows = range(row, row + len(item.draws))
        row = rows.stop
        if item.completion.params.logits_processors:
            for each in rows:
                try:
                    logits[each] = ops.upload(item.completion.process(ops.download(logits[each]), sampled[each].bias))
                except Exception as error:
                    item.completion.failure = error
