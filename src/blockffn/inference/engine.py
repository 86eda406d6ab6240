"""`Engine`: from text to text with a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from blockffn.checkpoints.load import load, model_folder
from blockffn.checkpoints.tokenizer import load_tokenizer
from blockffn.inference.batch import decode_batch
from blockffn.inference.decode import Generation, GenerationSettings, decode
from blockffn.inference.model_target import ModelTarget
from blockffn.inference.statistics import GenerationStatistics, Recorder, stored_bits_per_weight
from blockffn.inference.target import check_request
from blockffn.inference.text import Detokenizer, StopStrings
from blockffn.models.causal_lm import BlockFFNForCausalLM


@dataclass(frozen=True)
class Completion:
    """What the model wrote.

    Attributes:
        text: the new text, without special tokens and without the stop string that ended it.
        token_ids: all new tokens, those of the stop string and the end-of-sequence token included.
        finish_reason: `length`, `eos` or `stop`.
    """

    prompt: str
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    statistics: GenerationStatistics


class Engine:
    """A model with its tokenizer and a cache. One request at a time: a new one ends what a stream would still write.

    Keyword arguments of the requests are the fields of `GenerationSettings` and `stop`, strings that end the text.
    The end-of-sequence tokens are the tokenizer's if none are given.

    Args:
        capacity: tokens, of prompt and new ones together, that fit; default: the model's context.

    Example::

        engine = Engine.load("runs/demo/blockffn")
        for piece in engine.stream("import ", max_new_tokens=40, temperature=0.0):
            print(piece, end="", flush=True)
    """

    def __init__(
        self, model: BlockFFNForCausalLM, tokenizer: PreTrainedTokenizerBase, *, capacity: int | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.target = ModelTarget(model, capacity=capacity)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        capacity: int | None = None,
    ) -> Engine:
        """The engine of a run's folder or of a model's; on a GPU if there is one and `device` does not say otherwise.

        Raises:
            ValueError: there is no model that can be read, or the capacity is beyond its context.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load(path, device=device, dtype=dtype)
        return cls(model, load_tokenizer(model_folder(Path(path))), capacity=capacity)

    def generate(self, prompt: str, **settings: Any) -> Completion:
        """Continue a prompt.

        Raises:
            ValueError: an unknown or wrong setting, an empty prompt for a tokenizer without a beginning-of-sequence
                token, or prompt and new tokens beyond the capacity; before any work.
        """
        stream = self.stream(prompt, **settings)
        for _ in stream:
            pass
        return stream.completion

    def stream(self, prompt: str, **settings: Any) -> TextStream:
        """Continue a prompt, and get the text while it is written. Arguments and errors as for `generate`."""
        return TextStream(self, prompt, **self._settings(settings))

    def generate_batch(self, prompts: Sequence[str], **settings: Any) -> list[Completion]:
        """Continue several prompts together. Prompt i draws with `seed + i`; times are those of the whole batch.

        Raises:
            ValueError: as `generate`.
        """
        chosen = self._settings(settings)
        watches = [StopStrings(chosen["stop"]) for _ in prompts]
        ids = [self.encode(prompt) for prompt in prompts]
        texts = [Detokenizer(self.tokenizer, prompt_ids) for prompt_ids in ids]
        pieces: list[list[str]] = [[] for _ in prompts]

        def on_token(row: int, token: int) -> bool:
            pieces[row].append(watches[row].add(texts[row].add(token)))
            return watches[row].found is not None

        generations = decode_batch(self.target.forward, ids, chosen["settings"], capacity=self.target.capacity,
                                   on_token=on_token)  # fmt: skip
        completions = []
        for row, generation in enumerate(generations):
            pieces[row] += [watches[row].add(texts[row].finish()), watches[row].finish()]
            completions.append(self.complete(prompts[row], "".join(pieces[row]), ids[row], generation))
        return completions

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, behind the beginning-of-sequence token if the tokenizer has one."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = bos + self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError("the prompt is empty and the tokenizer has no beginning-of-sequence token; give a prompt")
        return ids

    def complete(self, prompt: str, text: str, prompt_ids: list[int], generation: Generation) -> Completion:
        """A request's result, its statistics with those that follow from the model's sizes."""
        config = self.model.config
        bits = stored_bits_per_weight(self.model, config)
        statistics = generation.statistics.of_model(config, bits_per_weight=bits)
        return Completion(prompt, text, prompt_ids, generation.token_ids, generation.finish_reason, statistics)

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """`settings` and `stop` of a request."""
        known = {field.name for field in fields(GenerationSettings)}
        unknown = sorted(set(given) - known - {"stop"})
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; choose from {', '.join(sorted(known | {'stop'}))}")
        stop = given.get("stop", ())
        values = {name: value for name, value in given.items() if name != "stop"}
        if "eos_token_ids" not in values and self.tokenizer.eos_token_id is not None:
            values["eos_token_ids"] = (self.tokenizer.eos_token_id,)
        return {"settings": GenerationSettings(**values), "stop": (stop,) if isinstance(stop, str) else tuple(stop)}


class TextStream:
    """Text of one request, in pieces as it is written; ends with the request.

    Attributes:
        completion: the whole, once the stream has ended.
    """

    completion: Completion

    def __init__(self, engine: Engine, prompt: str, *, settings: GenerationSettings, stop: tuple[str, ...]) -> None:
        self._engine, self._prompt, self._settings = engine, prompt, settings
        self._stop = StopStrings(stop)
        self._ids = engine.encode(prompt)
        check_request(engine.target, self._ids, settings.max_new_tokens)
        self._pieces = self._write()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _write(self) -> Iterator[str]:
        engine, recorder, new, reason = self._engine, Recorder(), list[int](), "length"
        text, shown = Detokenizer(engine.tokenizer, self._ids), list[str]()
        for token in decode(engine.target, self._ids, self._settings, recorder):
            new.append(token)
            shown.append(self._stop.add(text.add(token)))
            if shown[-1]:
                yield shown[-1]
            if token in self._settings.eos_token_ids:
                reason = "eos"
            elif self._stop.found is not None:
                reason = "stop"
            if reason != "length":
                break
        rest = self._stop.add(text.finish()) + self._stop.finish()
        if rest:
            shown.append(rest)
            yield rest
        statistics = recorder.statistics(prompt_tokens=len(self._ids), new_tokens=len(new))
        generation = Generation(new, reason, statistics)
        self.completion = engine.complete(self._prompt, "".join(shown), self._ids, generation)
