"""The forward pass of the Llama family (Llama, Mistral, Qwen2, Qwen3), written once against `ops`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupaged.checkpoint.config import ModelConfig
from cupaged.model.parameters import load
from cupaged.model.rope import rope_table


@dataclass
class Batch:
    """One step's tokens of all its sequences, as host arrays; `ops.numpy` says what the index arrays mean."""

    token_ids: np.ndarray  # int32 [T]
    logit_rows: np.ndarray  # int32 [R], the rows whose logits are wanted
    q_indptr: np.ndarray  # int32 [B+1]
    seq_lens: np.ndarray  # int32 [B]
    page_indptr: np.ndarray  # int32 [B+1]
    page_indices: np.ndarray  # int32 [nnz]


class Llama:
    """The weights on the device of `ops`, and the function they define.

    Args:
        config: geometry.
        weights: (Hugging Face name, host array) pairs; uploaded one by one, so that the host holds one tensor at a time.
        ops: `cupaged.ops.numpy` or `cupaged.ops.cuda`.
        dtype: one of `ops.DTYPES`, of weights and activations.
        max_positions: the longest sequence that will be asked for.
        quantization: of the matrices, a kind of `ops.quantized`; None: none.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, np.ndarray]],
        ops: Any,
        dtype: str,
        max_positions: int,
        quantization: str | None = None,
    ) -> None:
        self.config, self.ops, self.quantization = config, ops, quantization
        self.decoder: Any = None  # a `model.decoder.Decoder`, once there is one: takes steps of one token a sequence
        self.params = load(config, weights, ops, dtype, quantization)
        self.rope_table = ops.upload(rope_table(config.rope, config.head_dim, max_positions))

    def forward(
        self,
        batch: Batch,
        k_pool: np.ndarray,
        v_pool: np.ndarray,
        kv_scales: np.ndarray | None = None,
        ops: Any = None,
    ) -> np.ndarray:
        """Append the batch's K/V to the pools and return float32 logits [R, vocab].

        Pools are [num_layers, num_kv_heads, num_blocks, block_size, head_dim]; kv_scales [num_layers, ...] belong to pools of 8
        bits, as `ops.numpy` says. Without `ops`, a step that the decoder takes is its affair; its logits hold until the next.
        """
        if ops is None:
            if self.decoder is not None and self.decoder.takes(batch):
                return self.decoder.logits(batch)
            ops = self.ops
        config, params, eps = self.config, self.params, self.config.rms_norm_eps
        num_tokens = len(batch.token_ids)
        index = ops.index(batch.q_indptr, batch.seq_lens, batch.page_indptr, batch.page_indices)

        x = ops.embedding(ops.upload(batch.token_ids), params.embed)  # [T, hidden]
        for number, (layer, window) in enumerate(zip(params.layers, config.sliding_windows, strict=True)):
            kv = (k_pool[number], v_pool[number], None if kv_scales is None else kv_scales[number])
            qk_gains = (layer.q_norm, layer.k_norm) if config.qk_norm else None
            qkv = ops.norm_linear(x, layer.input_norm, eps, layer.qkv, layer.qkv_bias)
            qkv = qkv.reshape(num_tokens, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
            q = ops.rope_append(qkv, self.rope_table, *kv, index, config.num_heads, qk_gains, eps)
            attended = ops.paged_attention(q, *kv, index, config.head_dim**-0.5, window)
            x = ops.linear_add(attended.reshape(num_tokens, -1), layer.o, x, layer.o_bias)
            h = ops.norm_swiglu(x, layer.post_norm, eps, layer.gate_up, layer.gate_up_bias)
            x = ops.linear_add(h, layer.down, x, layer.down_bias)

        x = ops.embedding(ops.upload(batch.logit_rows), x)  # the same gather: [R, hidden]
        return ops.norm_linear(x, params.norm, eps, params.head, dtype="float32")

    def check(self) -> None:
        """DeviceError if the device has failed in a step that is over."""
        if self.decoder is not None:
            self.decoder.check()
        self.ops.check()
