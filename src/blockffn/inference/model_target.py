"""`ModelTarget`: the language model behind the `Target` protocol, run by its own modules over a preallocated cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockffn.inference.cached_attention import CachedAttention, expansion_weight
from blockffn.inference.ids import Ids, on_host
from blockffn.inference.kv_cache import KVCache, window
from blockffn.inference.target import Step
from blockffn.models.attention import LatentAttention
from blockffn.models.causal_lm import BlockFFNForCausalLM


class ModelTarget:
    """A `Target` that runs `model`, which it puts into evaluation mode.

    Args:
        model: of any method, dtype and device.
        capacity: tokens that the cache holds; default: the model's context.
        chunk_size: a longer chain is run in pieces of so many tokens, which bounds the memory of attention.

    Raises:
        ValueError: capacity beyond the model's context, or chunk size below 1.
    """

    def __init__(self, model: BlockFFNForCausalLM, *, capacity: int | None = None, chunk_size: int = 512) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.forward = CachedForward(model)
        self.vocab_size = model.config.vocab_size
        self.chunk_size = chunk_size
        self._capacity = checked_capacity(model, capacity)
        self.cache = self.forward.make_cache(self._capacity)
        self._length = 0
        self._pending: Pending | None = None

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    def reset(self) -> None:
        self._length, self._pending = 0, None

    @torch.no_grad()
    def extend(self, tokens: Ids, parents: Ids | None = None) -> Step:
        """As the protocol says, of tensors as well. Parents on a device are trusted; others are checked.

        Raises:
            ValueError: tokens are pending, none were given, they do not fit, or a parent does not precede its child.
        """
        tokens = on_host(tokens)
        count = len(tokens)
        check_room(count, self._pending, length=self._length, capacity=self._capacity)
        pending = Pending(count, None if parents is None else on_host(parents))
        pending.check_parents()
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        result = self._run_chain(ids) if parents is None else self._run_tree(ids, torch.as_tensor(parents))
        self._pending = pending
        return result.step(self.forward.logits(result.hidden))

    @torch.no_grad()
    def prefill(self, tokens: Ids) -> Step:
        """Run and commit a chain in chunks, with the logits `[1, V]` of its last token only.

        Raises:
            ValueError: as `extend`.
        """
        tokens = on_host(tokens)
        check_room(len(tokens), self._pending, length=self._length, capacity=self._capacity)
        result = self._run_chain(torch.as_tensor(tokens, dtype=torch.int64))
        self._length += len(tokens)
        return result.step(self.forward.logits(result.hidden[-1:]))

    def commit(self, kept: Ids) -> None:
        """As the protocol says, of tensors as well. Indices on a device are trusted; others are checked.

        Raises:
            ValueError: nothing is pending, or the indices are no path from a root.
        """
        if self._pending is None:
            raise ValueError("nothing to commit: extend first")
        if not self._pending.keeps_first(on_host(kept)):
            rows = torch.as_tensor(kept, dtype=torch.int64, device=self.forward.device)
            self.cache.move(self._length + rows, self._length)
        self._length += len(kept)
        self._pending = None

    def _run_chain(self, tokens: Tensor) -> Forward:
        return _join([self._run_piece(tokens, begin) for begin in range(0, len(tokens), self.chunk_size)])

    def _run_piece(self, tokens: Tensor, begin: int) -> Forward:
        piece = tokens[begin : begin + self.chunk_size].to(self.forward.device)
        first = self._length + begin
        rows = torch.arange(first, first + len(piece), device=self.forward.device).unsqueeze(0)
        columns = torch.arange(window(first + len(piece)), device=self.forward.device)
        return self.forward(self.cache, piece.unsqueeze(0), rows, rows, columns <= rows.unsqueeze(-1))

    def _run_tree(self, tokens: Tensor, parents: Tensor) -> Forward:
        device, first, count = self.forward.device, self._length, len(tokens)
        ancestors = ancestors_of(parents.to(device))
        positions = first + ancestors.sum(dim=-1) - 1
        rows = torch.arange(first, first + count, device=device)
        visible = torch.zeros(count, window(first + count), dtype=torch.bool, device=device)
        visible[:, :first] = True
        visible[:, first : first + count] = ancestors
        batch = [tensor.unsqueeze(0) for tensor in (tokens.to(device), positions, rows, visible)]
        return _join([self.forward(self.cache, *batch)])


@dataclass(frozen=True)
class Pending:
    """The last extend: how many tokens, and their parents (`None`: a chain; a tensor: on a device, and trusted)."""

    count: int
    parents: list[int] | Tensor | None = None

    def check_parents(self) -> None:
        """Raise `ValueError` unless there is a parent of each token, that precedes it."""
        if self.parents is None:
            return
        if len(self.parents) != self.count:
            raise ValueError(f"there must be as many parents as tokens, {self.count}, got {len(self.parents)}")
        if isinstance(self.parents, list) and not all(-1 <= parent < i for i, parent in enumerate(self.parents)):
            raise ValueError(f"each parent must be -1 or precede its token, got {self.parents}")

    def keeps_first(self, kept: list[int] | Tensor) -> bool:
        """Whether these are the first tokens, which lie where they belong already.

        Raises:
            ValueError: they are too many, or no path from a root. Those of a device are trusted, and `False`.
        """
        if len(kept) > self.count:
            raise ValueError(f"{len(kept)} tokens cannot be kept of {self.count}")
        if isinstance(kept, Tensor):
            return False
        first = kept == list(range(len(kept)))
        if not (first if self.parents is None else isinstance(self.parents, Tensor) or self._is_path(kept)):
            raise ValueError(f"kept tokens must be a path from a root of the last extend, got {kept}")
        return first

    def _is_path(self, kept: list[int]) -> bool:
        """Whether each is the parent of the next; where parents are known."""
        assert isinstance(self.parents, list)
        inside = all(0 <= node < self.count for node in kept)
        return inside and [self.parents[node] for node in kept] == [-1, *kept[:-1]][: len(kept)]


@dataclass(frozen=True)
class Forward:
    """Hidden states `[B, T, D]` or, joined, `[T, D]`, and the layers' routing weights' support `[L, B, T, E]` bool."""

    hidden: Tensor
    is_active: Tensor | None

    def step(self, logits: Tensor) -> Step:
        if self.is_active is None:
            return Step(logits, self.hidden)
        return Step(logits, self.hidden, self.is_active.any(dim=1).sum(dim=-1), self.is_active.sum(dim=-1))


class CachedForward:
    """One pass of a model's modules over a cache, for any batch. Shapes depend on those of the arguments alone."""

    def __init__(self, model: BlockFFNForCausalLM) -> None:
        self.model = model.eval()
        self.device = model.model.norm.weight.device
        self._latent = [layer.self_attn for layer in model.model.layers if isinstance(layer.self_attn, LatentAttention)]
        with torch.no_grad():
            self._expansions = [expansion_weight(module) for module in self._latent]

    def make_cache(self, capacity: int, *, batch: int = 1) -> KVCache:
        dtype = self.model.model.norm.weight.dtype
        return KVCache(self.model.config, capacity=capacity, batch=batch, dtype=dtype, device=self.device)

    def __call__(self, cache: KVCache, tokens: Tensor, positions: Tensor, rows: Tensor, visible: Tensor) -> Forward:
        """Run tokens `[B, T]` at positions `[B, T]`, cached in rows `[B, T]`, seeing rows `visible [B, T, S]`."""
        decoder = self.model.model
        x = decoder.embed_tokens(tokens) * self.model.config.scale_emb
        position_embeddings = decoder.rotary_emb(x, position_ids=positions)
        attend_over = CachedAttention(cache, rows, visible, self._expansions)
        weights = []
        for layer in decoder.layers:
            x, _, routing = layer(x, position_embeddings=position_embeddings, attend_over=attend_over)
            if routing is not None:
                weights.append(routing.weights)
        return Forward(decoder.norm(x), torch.stack(weights) != 0 if weights else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` in float32 of hidden states `[..., D]`."""
        logits: Tensor = self.model.lm_head(self.model.head_input(hidden)).float()
        return logits


def checked_capacity(model: BlockFFNForCausalLM, capacity: int | None) -> int:
    """`capacity`, by default the model's context. Raises `ValueError` if it is below 1 or beyond the context."""
    context = model.config.max_position_embeddings
    if capacity is None:
        return context
    if not 1 <= capacity <= context:
        raise ValueError(f"capacity must lie between 1 and the model's context of {context} tokens, got {capacity}")
    return capacity


def ancestors_of(parents: Tensor) -> Tensor:
    """Which tokens `[T, T]` (bool) are the token itself or an ancestor, from parents `[T]`; without a wait.

    Reachability by repeated squaring: after k rounds paths of up to 2^k edges are known.
    """
    count = len(parents)
    index = torch.arange(count, device=parents.device)
    reach = ((parents.unsqueeze(1) == index) | (index.unsqueeze(1) == index)).float()
    for _ in range(max(count - 1, 0).bit_length()):
        reach = (reach @ reach).clamp(max=1)
    return reach > 0


def check_room(count: int, pending: Pending | None, *, length: int, capacity: int) -> None:
    """Raise `ValueError` unless so many tokens can extend a cache of `length` committed ones."""
    if pending is not None:
        raise ValueError("tokens are pending: commit those to keep (possibly none) before the next extend")
    if not count:
        raise ValueError("extend takes at least one token, got none")
    if length + count > capacity:
        raise ValueError(
            f"{length} committed tokens and {count} more exceed the cache's capacity of {capacity}; make the "
            "target with a larger one, or commit less"
        )


def _join(pieces: list[Forward]) -> Forward:
    """Pieces of one sequence end to end, without the batch dimension."""
    hidden = torch.cat([piece.hidden[0] for piece in pieces])
    supports = [piece.is_active[:, 0] for piece in pieces if piece.is_active is not None]
    return Forward(hidden, torch.cat(supports, dim=1) if supports else None)
