"""The forward pass of the Llama family (Llama, Mistral, Qwen2, Qwen3), written once against `ops`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from cupaged.checkpoint.config import ModelConfig
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
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, np.ndarray]],
        ops: ModuleType,
        dtype: str,
        max_positions: int,
    ) -> None:
        self.config, self.ops = config, ops
        self.params = {name: ops.upload(array, dtype) for name, array in weights}
        self.rope_table = ops.upload(rope_table(config.rope, config.head_dim, max_positions))

    def forward(self, batch: Batch, k_pool: np.ndarray, v_pool: np.ndarray, kv_scales: np.ndarray | None = None) -> np.ndarray:
        """Append the batch's K/V to the pools and return float32 logits [R, vocab].

        Pools are [num_layers, num_kv_heads, num_blocks, block_size, head_dim]; kv_scales [num_layers, ...] belong to pools of 8
        bits, as `ops.numpy` says.
        """
        ops, config = self.ops, self.config
        num_tokens = len(batch.token_ids)
        index = ops.index(batch.q_indptr, batch.seq_lens, batch.page_indptr, batch.page_indices)

        x = ops.embedding(ops.upload(batch.token_ids), self.params["model.embed_tokens.weight"])  # [T, hidden]
        for layer, window in enumerate(config.sliding_windows):
            name = f"model.layers.{layer}"
            h = self._norm(x, f"{name}.input_layernorm")
            q = self._linear(h, f"{name}.self_attn.q_proj").reshape(num_tokens, config.num_heads, config.head_dim)
            k = self._linear(h, f"{name}.self_attn.k_proj").reshape(num_tokens, config.num_kv_heads, config.head_dim)
            v = self._linear(h, f"{name}.self_attn.v_proj").reshape(num_tokens, config.num_kv_heads, config.head_dim)
            if config.qk_norm:
                q = self._norm(q, f"{name}.self_attn.q_norm")
                k = self._norm(k, f"{name}.self_attn.k_norm")
            kv = (k_pool[layer], v_pool[layer], None if kv_scales is None else kv_scales[layer])
            q = ops.rope_append(q, k, v, self.rope_table, *kv, index)
            attended = ops.paged_attention(q, *kv, index, config.head_dim**-0.5, window)
            x = ops.add(x, self._linear(attended.reshape(num_tokens, -1), f"{name}.self_attn.o_proj"))

            h = self._norm(x, f"{name}.post_attention_layernorm")
            h = ops.swiglu(self._linear(h, f"{name}.mlp.gate_proj"), self._linear(h, f"{name}.mlp.up_proj"))
            x = ops.add(x, self._linear(h, f"{name}.mlp.down_proj"))

        x = ops.embedding(ops.upload(batch.logit_rows), x)  # the same gather: [R, hidden]
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return ops.linear(self._norm(x, "model.norm"), self.params[f"{head}.weight"], dtype="float32")

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.ops.linear(x, self.params[f"{name}.weight"], self.params.get(f"{name}.bias"))

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.ops.rms_norm(x, self.params[f"{name}.weight"], self.config.rms_norm_eps)
