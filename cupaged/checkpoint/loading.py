"""Weights on their way to a model: a bar while they are taken, and how fast it went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cupaged.checkpoint.fetch import progress_bar
from cupaged.checkpoint.weights import Weights


@dataclass(frozen=True)
class LoadStats:
    """Bytes of the weights as they are stored, and the seconds in which they were read, converted and put where they are used.

    On the CPU, matrices that need neither conversion nor merging stay where the file is mapped, and are read when used.
    """

    num_bytes: int
    seconds: float

    @property
    def gb_s(self) -> float:
        """10^9 bytes a second."""
        return self.num_bytes / 1e9 / self.seconds


class Loading:
    """The (name, array) pairs of `weights`, passed on; with a bar on stderr where that is a terminal.

    Attributes:
        stats: None until the last pair was taken, and whoever took it came back for more.
    """

    stats: LoadStats | None = None

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        started = time.perf_counter()
        with progress_bar("load", self._weights.num_bytes) as bar:
            for name, array in self._weights:
                yield name, array
                bar.update(array.nbytes)
        self.stats = LoadStats(self._weights.num_bytes, time.perf_counter() - started)
