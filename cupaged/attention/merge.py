"""merge_states(): attention over two sets of keys, joined."""

from __future__ import annotations

import numpy as np

from cupaged.errors import InvalidArgument


def merge_states(out_a: np.ndarray, lse_a: np.ndarray, out_b: np.ndarray, lse_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of attention over the keys of a and those of b, which have none in common, from the attention over each.

    out [..., head_dim] and lse [...] (natural log), float32 or float64. An lse of -inf says that no key was seen: whatever that
    out holds counts for nothing, and where neither saw any the result is 0 and -inf (Milakov and Gimelshein 2018, section 3.1).
    """
    rows = out_a.shape[:-1]
    for name, array, shape in (("lse_a", lse_a, rows), ("out_b", out_b, out_a.shape), ("lse_b", lse_b, rows)):
        if array.shape != shape:
            raise InvalidArgument(f"{name} has shape {array.shape}; to go with out_a, {out_a.shape}, give {shape}")
    largest = np.maximum(lse_a, lse_b)
    shift = np.where(largest == -np.inf, 0, largest)
    weight_a, weight_b = np.exp(lse_a - shift), np.exp(lse_b - shift)  # the larger is 1, unless there are no keys at all
    total = weight_a + weight_b
    share = 1 / np.maximum(total, 1)
    out = _weighted(out_a, weight_a * share) + _weighted(out_b, weight_b * share)
    with np.errstate(divide="ignore"):
        return out, shift + np.log(total)


def _weighted(out: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """out * weight, and 0 where the weight is: 0 * NaN would be NaN."""
    with np.errstate(invalid="ignore"):
        return np.where(weight[..., None] == 0, 0, out * weight[..., None])
