"""Text that a model writes, with the number of experts that each token used."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from blockffn.inference.engine import Completion, Engine
from blockffn.models.causal_lm import BlockFFNForCausalLM


def generate_sample(
    model: BlockFFNForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    **settings: Any,
) -> dict[str, Any]:
    """Continue `prompt` and describe what came of it; `settings` as for `Engine.generate`.

    Raises:
        ValueError: the prompt and the new tokens do not fit into the model's context, or a setting is wrong.
    """
    engine = Engine(model, tokenizer)
    return describe(engine, engine.generate(prompt, max_new_tokens=max_new_tokens, **settings))


@torch.no_grad()
def describe(engine: Engine, completion: Completion) -> dict[str, Any]:
    """A completion as plain data, as `sample.json` holds it.

    `tokens` lists text and, for sparse models, `active_experts` (mean over layers) and `active_share` in percent.
    """
    model, tokenizer = engine.model, engine.tokenizer
    ids = completion.prompt_ids + completion.token_ids
    routings = model(torch.tensor([ids], device=model.device), output_routing=True, use_cache=False).routings
    active = None
    if routings:
        active = torch.stack([(r.weights[0] != 0).sum(dim=-1) for r in routings]).double().mean(dim=0).tolist()
    tokens = []
    for i, text in enumerate(_pieces(tokenizer, ids)):
        if ids[i] in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            continue
        token: dict[str, Any] = {"text": text, "generated": i >= len(completion.prompt_ids)}
        if active is not None:
            token |= {"active_experts": active[i], "active_share": 100 * active[i] / model.config.num_experts}
        tokens.append(token)
    return {
        "prompt": completion.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": tokens,
        "num_experts": model.config.num_experts if active is not None else None,
        "tokens_per_second": completion.statistics.tokens_per_second,
        "statistics": completion.statistics.to_dict(),
    }


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds. A character split over tokens appears whole at the last of them."""
    pieces: list[str] = []
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = str(tokenizer.decode(held))
        if text.endswith("\ufffd") and len(held) < 4:
            pieces.append("")
        else:
            pieces.append(text)
            held = []
    return pieces
