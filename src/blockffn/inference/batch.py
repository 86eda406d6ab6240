"""Several prompts decoded together: their tokens share each run of the model, their rows in the cache are apart.

Prompts of unequal lengths are padded behind their end; what padding leaves in the cache is never seen and is
overwritten by the new tokens. A finished sequence leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from blockffn.inference.decode import Generation, GenerationSettings, Request, check_finite
from blockffn.inference.kv_cache import KVCache, window
from blockffn.inference.model_target import CachedForward
from blockffn.inference.sampling import choose
from blockffn.inference.statistics import PARTS, Recorder
from blockffn.inference.target import Step, check_fits, check_prompt

PREFILL_CHUNK = 512


@torch.no_grad()
def decode_batch(
    forward: CachedForward,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    capacity: int,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[Generation]:
    """Continue prompts of any lengths together.

    Sequence i draws with `seed + i`, and gets what it would get alone up to rounding. Times in the statistics are those
    of the batch until the sequence ended.

    Args:
        capacity: tokens per sequence.
        on_token: called with the number of the prompt and its new token; `True` ends that sequence.

    Raises:
        ValueError: no prompt, or one that is empty, foreign or too long; before any work.
    """
    if not prompts:
        raise ValueError("no prompt to continue; give at least one")
    for prompt in prompts:
        check_prompt(prompt, vocab_size=forward.model.config.vocab_size)
        check_fits(len(prompt), settings.max_new_tokens, capacity=capacity)
    cache = forward.make_cache(max(map(len, prompts)) + settings.max_new_tokens - 1, batch=len(prompts))
    seconds = dict.fromkeys(PARTS, 0.0)
    alive = [_Sequence(i, prompt, settings, forward.device, seconds, on_token) for i, prompt in enumerate(prompts)]
    finished: dict[int, Generation] = {}
    clock = Recorder(seconds)
    clock.start()
    logits = forward.logits(_prefill(forward, cache, prompts))
    check_finite(Step(logits, logits))
    clock.lap("prefill")
    while True:
        clock.start()
        chosen = [sequence.choose(logits[row]) for row, sequence in enumerate(alive)]
        clock.lap("sampling")
        staying = []
        for row, sequence in enumerate(alive):
            sequence.request.take(chosen[row : row + 1])
            if sequence.request.finish_reason is None:
                staying.append(row)
            else:
                finished[sequence.number] = sequence.request.generation()
        if not staying:
            return [finished[i] for i in range(len(prompts))]
        if len(staying) < len(alive):
            cache.keep(torch.tensor(staying, device=forward.device))
            alive = [alive[row] for row in staying]
        clock.start()
        logits = _step(forward, cache, alive)
        clock.lap("decode")


class _Sequence:
    """One prompt of the batch with its own random numbers."""

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        settings: GenerationSettings,
        device: torch.device,
        seconds: dict[str, float],
        on_token: Callable[[int, int], bool | None] | None,
    ) -> None:
        self.number = number
        receive = None if on_token is None else partial(on_token, number)
        self.request = Request(prompt, settings, on_token=receive, recorder=Recorder(seconds))
        self.generator = torch.Generator(device).manual_seed(settings.seed + number)

    def choose(self, logits: Tensor) -> int:
        settings = self.request.settings
        history = torch.tensor(self.request.tokens) if settings.repetition_penalty != 1 else None
        return choose(logits, history, settings, self.generator)


def _prefill(forward: CachedForward, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Fill the cache; hidden states `[B, D]` of the prompts' last tokens."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    hidden = []
    for begin in range(0, padded.shape[1], PREFILL_CHUNK):
        piece = padded[:, begin : begin + PREFILL_CHUNK].to(forward.device)
        rows = torch.arange(begin, begin + piece.shape[1], device=forward.device).expand(len(prompts), -1)
        hidden.append(_run(forward, cache, piece, rows, size=begin + piece.shape[1])[0])
    last = (lengths - 1).to(forward.device)
    return torch.cat(hidden, dim=1)[torch.arange(len(prompts), device=forward.device), last]


def _step(forward: CachedForward, cache: KVCache, alive: list[_Sequence]) -> Tensor:
    """Run the last token of each sequence; logits `[B, V]`."""
    tokens = torch.tensor([[sequence.request.tokens[-1]] for sequence in alive], device=forward.device)
    ends = [len(sequence.request.tokens) for sequence in alive]
    rows = torch.tensor(ends, device=forward.device).unsqueeze(1) - 1
    hidden, is_active = _run(forward, cache, tokens, rows, size=max(ends))
    logits = forward.logits(hidden[:, -1])
    union = None if is_active is None else is_active.flatten(1, 2).any(dim=1).sum(dim=-1)
    for row, sequence in enumerate(alive):
        active = None if is_active is None else is_active[:, row].sum(dim=-1)
        sequence.request.recorder.add(Step(logits[row], hidden[row], union, active), sequences=len(alive))
    return logits


def _run(
    forward: CachedForward, cache: KVCache, tokens: Tensor, rows: Tensor, *, size: int
) -> tuple[Tensor, Tensor | None]:
    columns = torch.arange(window(size), device=forward.device)
    result = forward(cache, tokens, rows, rows, columns <= rows.unsqueeze(-1))
    return result.hidden, result.is_active
