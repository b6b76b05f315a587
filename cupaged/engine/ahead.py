"""Plain decodes on a device with a Decoder: their steps are queued one ahead of the tokens that the host knows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cupaged.engine.drawing import Work
from cupaged.engine.scheduler import Scheduler
from cupaged.engine.sequence import Sequence
from cupaged.model.llama import Batch, Llama
from cupaged.model.sampling import draws

if TYPE_CHECKING:
    from cupaged.model.decoder import Drawn


@dataclass
class Step:
    """What the device has been told to compute: a token of each sequence, and the draw of the next one."""

    sequences: list[Sequence]
    draws: np.ndarray  # DRAWS, of each sequence
    rows: list[int]  # of each sequence in the decoder's step
    drawn: Drawn

    def tokens(self) -> list[int]:
        """The next token of each sequence, once the device has drawn it."""
        tokens = self.drawn.tokens()
        return [tokens[row] for row in self.rows]


class Ahead:
    """Queues steps of plain decodes, and behind each of them the next one before its tokens are known.

    So the device goes on while the host waits for the tokens of a step, hands them out and schedules. What is scheduled then
    decides: of the step ahead, the rows of sequences that go on by their one next token are taken as they are, and the others
    are thrown away. That does no harm, because the device does one thing after the other:

    - A token that is computed again, be it into other blocks, gives the same K/V and draw, up to the rounding of a batch.
    - The row of a sequence that has ended or was preempted writes to the slot behind its last known token, in a block that may
      be another's by now. Whoever has it computes what is to be read there in a later step, which begins when this one is over.
    - Nobody else reads that slot: what is found by its content is blocks full of known tokens, and of a block that forks share
      whoever writes has a copy.
    """

    def __init__(self, model: Llama, scheduler: Scheduler) -> None:
        self._model, self._scheduler = model, scheduler
        self._next: Step | None = None
        self.policy_s = 0.0  # in the scheduler and the block manager

    def begin(self, work: list[Work]) -> Step | None:
        """Queue the step of `work`, whose tokens are known; None where not all of it is the decoder's."""
        decoder = self._model.decoder
        if decoder is None or not all(map(_is_plain, work)) or len(work) > decoder.max_sequences:
            return None
        return self._queue([item.completion.seq for item in work], draws([item.completion.sampling_row(()) for item in work]))

    def go_on(self, step: Step) -> None:
        """Queue the step after this one, whose tokens are not known yet, for all that their length does not end.

        Nothing is queued where not all of them have room.
        """
        began = time.perf_counter()
        going = self._scheduler.reserve(step.sequences)
        self.policy_s += time.perf_counter() - began
        if going:
            under = step.draws[going]
            under["position"] += 1
            sequences, rows = ([values[place] for place in going] for values in (step.sequences, step.rows))
            self._next = self._queue(sequences, under, rows)

    def take(self, work: list[Work]) -> tuple[Step | None, list[Work], list[Work]]:
        """The step ahead as far as `work` is in it, None for not at all; the work that is in it, in order; and what is not."""
        step, self._next = self._next, None
        if step is None:
            return None, [], work
        places, taken, rest = {seq: place for place, seq in enumerate(step.sequences)}, [], []
        for item in work:
            # Only handing out and scheduling have come between: where there is one token, it is the one that was foreseen.
            (taken if item.count == 1 and item.completion.seq in places else rest).append(item)
        if not taken:
            return None, [], work
        kept = [places[item.completion.seq] for item in taken]
        sequences, rows = ([values[place] for place in kept] for values in (step.sequences, step.rows))
        return Step(sequences, step.draws[kept], rows, step.drawn), taken, rest

    def drop(self) -> None:
        """Take nothing from the step ahead: something else was computed behind it, or went wrong."""
        self._next = None

    def _queue(self, sequences: list[Sequence], under: np.ndarray, rows: list[int] | None = None) -> Step:
        """A step of the last tokens of all, or with `rows` of those after them, drawn in these rows of the last step."""
        ahead = rows is not None
        lengths = np.array([seq.num_tokens for seq in sequences], np.int32) + np.int32(ahead)
        num_pages = -(-lengths // self._scheduler.blocks.block_size)
        tables = [seq.page_table[:count] for seq, count in zip(sequences, num_pages.tolist(), strict=True)]
        each = np.arange(len(sequences) + 1, dtype=np.int32)
        batch = Batch(
            token_ids=np.array([] if ahead else [seq.token_ids[-1] for seq in sequences], np.int32),
            logit_rows=each[:-1],
            q_indptr=each,
            seq_lens=lengths,
            page_indptr=np.concatenate([each[:1], num_pages.cumsum(dtype=np.int32)]),
            page_indices=np.frombuffer(b"".join(tables), np.int32),
        )
        drawn = self._model.decoder.queue(batch, under, rows)
        return Step(sequences, under, list(range(len(sequences))), drawn)


def _is_plain(item: Work) -> bool:
    """Whether one token is to be computed, and the next one to be drawn from its logits as they are."""
    return item.count == len(item.draws) == 1 and not item.prompt and item.completion.is_plain
