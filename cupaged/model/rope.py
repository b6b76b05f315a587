"""Rotary position embedding: the table of cosines and sines, and the ways its frequencies are scaled."""

from __future__ import annotations

import math

import numpy as np

from cupaged.checkpoint.config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, max_positions: int) -> np.ndarray:
    """float32 [max_positions, head_dim]: cos(position * frequency_i) in the first half of a row, sin in the second.

    Angles are computed in float64: at position 10^5 a float32 product is off by 0.004 rad.
    """
    frequency, magnitude = _SCALED[rope.type](rope, rope.theta ** (-np.arange(0, head_dim, 2) / head_dim))
    angle = np.arange(max_positions)[:, None] * frequency
    return (magnitude * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)


def _default(rope: RopeConfig, frequency: np.ndarray) -> tuple[np.ndarray, float]:
    return frequency, 1.0


def _linear(rope: RopeConfig, frequency: np.ndarray) -> tuple[np.ndarray, float]:
    """Position interpolation (Chen et al. 2023): all positions divided by the factor."""
    return frequency / rope.factor, 1.0


def _llama3(rope: RopeConfig, frequency: np.ndarray) -> tuple[np.ndarray, float]:
    """Llama 3.1: wavelengths beyond the original context are interpolated, short ones kept, a ramp between."""
    turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return frequency * (keep + (1 - keep) / rope.factor), 1.0


def _yarn(rope: RopeConfig, frequency: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, sections 3.2-3.4): a ramp over the dimensions, and a softmax temperature on cos and sin."""

    def dimension(turns: float) -> float:
        """Index (a pair of elements counts once) of the frequency that makes so many turns in the original context."""
        wavelength = rope.original_max_position_embeddings / turns
        return len(frequency) * math.log(wavelength / (2 * math.pi)) / math.log(rope.theta)

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(frequency) - 1)
    keep = 1 - np.clip((np.arange(len(frequency)) - low) / max(high - low, 0.001), 0, 1)
    scaled = frequency * (keep + (1 - keep) / rope.factor)
    if rope.attention_factor is not None:
        return scaled, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scaled, magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return scaled, magnitude(1.0)


_SCALED = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
