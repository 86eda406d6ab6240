"""Other programs that continue the same prompts: Hugging Face's `generate()` and llama.cpp.

Each runs in this process, with as many threads, in the same rounds. What is not installed is left out and said.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from blockffn.evaluation.decoding import llama
from blockffn.evaluation.decoding.llama import formats_named
from blockffn.evaluation.decoding.modes import Subject
from blockffn.evaluation.decoding.ways import Run, Way
from blockffn.models.causal_lm import BlockFFNForCausalLM

PEERS = ("huggingface", "llama.cpp")
IN_FORMATS = "llama.cpp:"  # and the formats of its weights and of its head


def check_peers(names: Sequence[str]) -> None:
    """Raise `ValueError` for an unknown name, or one that is given twice."""
    for place, name in enumerate(names):
        if name.startswith(IN_FORMATS):
            formats_named(name.removeprefix(IN_FORMATS))
        elif name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; choose from {', '.join(PEERS)}, {IN_FORMATS}KIND/HEAD")
        if name in names[:place]:
            raise ValueError(f"peer {name!r} is named twice; name each once")


def make_peers(names: Sequence[str], subject: Subject, precision: str, capacity: int) -> tuple[list[Way], list[str]]:
    """The peers of these names for a dense model, and what is to be said about those that are left out.

    Raises:
        ValueError: names that `check_peers` refuses, or a precision or a shape that llama.cpp does not have.
    """
    check_peers(names)
    ways: list[Way] = []
    notes = []
    for name in names:
        if name == "huggingface":
            ways.append(HuggingFaceGenerate(f"{subject.label}, Hugging Face generate()", subject.model))
            continue
        named = name.startswith(IN_FORMATS)
        formats = formats_named(name.removeprefix(IN_FORMATS)) if named else llama.formats_of(precision)
        if (missing := llama.missing()) is not None:
            notes.append(missing)
        elif subject.model.device.type != "cpu":
            notes.append("llama.cpp is compared on the CPU alone")
        elif (reason := llama.why_not_running(formats)) is not None:
            notes.append(reason)
        else:
            ways.append(llama.LlamaCpp.like(subject.model.config, formats=formats, capacity=capacity))
    return ways, notes


class HuggingFaceGenerate:
    """`model.generate(do_sample=False)`, timed from its first new token to its last.

    What the model's own `generation_config` says of sampling, beams and penalties is set aside meanwhile: `generate`
    takes from there whatever its caller leaves open.
    """

    def __init__(self, name: str, model: BlockFFNForCausalLM) -> None:
        self.name, self._model = name, model

    def run(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Run:
        model, clock = self._model, _Clock()
        ids = torch.tensor([list(prompt_ids)], device=model.device)
        own, model.generation_config = model.generation_config, GenerationConfig()
        begin = time.perf_counter()
        try:
            with torch.no_grad():
                out: Any = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
                    min_new_tokens=max_new_tokens, pad_token_id=0, streamer=clock,
                )  # fmt: skip
        finally:
            model.generation_config = own
        first, last = clock.times[1], clock.times[-1]  # the first call has the prompt
        return Run(out[0, len(prompt_ids) :].tolist(), last - first, first - begin)


class _Clock:
    """A streamer that keeps no tokens, only when they came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
