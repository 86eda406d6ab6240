"""The preallocated cache: one row per token and layer.

Grouped-query attention keeps the rotated keys and the values of its key heads. Latent attention keeps the normalised
latent and the rotated shared key, from which keys and values of all heads follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockffn.configuration import BlockFFNConfig

# Attention reads a whole number of such blocks of rows, so that shapes change once in so many tokens.
BLOCK = 128


class KVCache:
    """Rows of all layers in one tensor, `[layers, B, capacity, width]`, zero at first.

    Capacity is rounded up to a multiple of `BLOCK`; who fills it keeps count of the rows that are valid.

    Raises:
        ValueError: capacity or batch below 1.
    """

    def __init__(
        self, config: BlockFFNConfig, *, capacity: int, batch: int = 1, dtype: torch.dtype, device: torch.device
    ) -> None:
        if capacity < 1 or batch < 1:
            raise ValueError(f"a cache needs room for at least 1 token of 1 sequence, got {capacity} of {batch}")
        self.widths = row_widths(config)
        rows = -(-capacity // BLOCK) * BLOCK
        shape = (config.num_hidden_layers, batch, rows, sum(self.widths))
        self._rows = torch.zeros(shape, dtype=dtype, device=device)
        self._batch = torch.arange(batch, device=device).unsqueeze(1)

    @property
    def nbytes(self) -> int:
        """Memory of the cache in bytes."""
        return self._rows.nbytes

    @property
    def capacity(self) -> int:
        """Rows of a sequence."""
        return self._rows.shape[2]

    def write(self, layer: int, rows: Tensor, first: Tensor, second: Tensor) -> None:
        """Put the parts `[B, T, widths]` of tokens into rows `[B, T]`."""
        self._rows[layer, self._batch, rows] = torch.cat((first, second), dim=-1).to(self._rows.dtype)

    def read(self, layer: int, size: int) -> Tensor:
        """The first `size` rows of a layer, `[B, size, width]`; a view."""
        return self._rows[layer, :, :size]

    def move(self, source: Tensor, destination: int) -> None:
        """Copy rows `source [K]`, in all layers, to `destination` and the rows after it."""
        self._rows[:, :, destination : destination + len(source)] = self._rows[:, :, source]

    def keep(self, sequences: Tensor) -> None:
        """Drop all sequences of the batch but those of the given numbers."""
        self._rows = self._rows[:, sequences]
        self._batch = self._batch[: len(sequences)]


def row_widths(config: BlockFFNConfig) -> tuple[int, int]:
    """Numbers that a token leaves in a layer: of latent and shared key (MLA), or of keys and of values (GQA)."""
    if config.attention_type == "mla":
        return config.kv_lora_rank, config.qk_rope_head_dim
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    return (config.num_key_value_heads * config.head_dim,) * 2


def window(rows: int) -> int:
    """`rows`, rounded up to whole blocks."""
    return -(-rows // BLOCK) * BLOCK
