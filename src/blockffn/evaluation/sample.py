"""Text that a model writes, with the number of experts that each token used."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from blockffn.models.causal_lm import BlockFFNForCausalLM


@torch.no_grad()
def generate_sample(
    model: BlockFFNForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Continue `prompt`; returns plain data as `sample.json` holds it.

    `tokens` lists text and, for sparse models, `active_experts` (mean over layers) and `active_share` in percent.
    `temperature` 0 is greedy.

    Raises:
        ValueError: the prompt and the new tokens do not fit into the model's context.
    """
    model.eval()
    device = next(model.parameters()).device
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt_ids = bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    context = model.config.max_position_embeddings
    if len(prompt_ids) + max_new_tokens > context:
        raise ValueError(
            f"{len(prompt_ids)} prompt tokens and {max_new_tokens} new ones exceed the model's context of {context}; "
            f"ask for at most {max(context - len(prompt_ids), 0)} new tokens or shorten the prompt"
        )
    if not prompt_ids:
        raise ValueError("the prompt is empty and the tokenizer has no beginning-of-sequence token; give a prompt")
    inputs = torch.tensor([prompt_ids], device=device)
    torch.manual_seed(seed)
    decoder: Any = model  # `generate` is annotated for a protocol that only transformers' own models declare
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    begin = time.perf_counter()
    ids = decoder.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )[0]
    seconds = time.perf_counter() - begin
    routings = model(ids[None], output_routing=True, use_cache=False).routings
    active = None
    if routings:
        active = torch.stack([(r.weights[0] != 0).sum(dim=-1) for r in routings]).double().mean(dim=0).tolist()
    tokens = []
    for i, text in enumerate(_pieces(tokenizer, ids.tolist())):
        if ids[i] in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            continue
        token: dict[str, Any] = {"text": text, "generated": i >= len(prompt_ids)}
        if active is not None:
            token |= {"active_experts": active[i], "active_share": 100 * active[i] / model.config.num_experts}
        tokens.append(token)
    return {
        "prompt": prompt,
        "text": tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True),
        "tokens": tokens,
        "num_experts": model.config.num_experts if active is not None else None,
        "tokens_per_second": (len(ids) - len(prompt_ids)) / seconds,
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
