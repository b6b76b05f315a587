"""Masks of packed bits: which positions each row of a batch sees, where neither causality nor a window says so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cupaged.errors import InvalidArgument


def pack_mask(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(mask, mask_indptr) for `run` and `plan`; masks[b] bool [rows, seq_len]: does a row of sequence b see a position.

    mask uint32, mask_indptr int32 [num_sequences + 1]: from mask_indptr[b] on there are ceil(seq_len / 32) words for each row
    of sequence b; bit i of word w, that of value 2^i, is for position 32 w + i. Bits past seq_len are never looked at, here 0.
    """
    words, indptr = [np.zeros(0, np.uint32)], [0]
    for b, seen in enumerate(masks):
        if not isinstance(seen, np.ndarray) or seen.dtype != bool or seen.ndim != 2:
            got = f"{seen.dtype} of shape {seen.shape}" if isinstance(seen, np.ndarray) else f"a {type(seen).__name__}"
            raise InvalidArgument(f"masks[{b}] is {got}; give a NumPy array of bool with two axes, [rows, seq_len]")
        padded = np.zeros((seen.shape[0], -(-seen.shape[1] // 32) * 32), bool)
        padded[:, : seen.shape[1]] = seen
        words.append(np.packbits(padded, axis=1, bitorder="little").reshape(-1).view("<u4").astype(np.uint32))
        indptr.append(indptr[-1] + words[-1].size)
    if indptr[-1] >= 2**31:
        raise InvalidArgument(f"masks take {indptr[-1]} words of 32 bits; give fewer rows, for less than 2^31 words")
    return np.concatenate(words), np.array(indptr, np.int32)
