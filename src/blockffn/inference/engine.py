"""`Engine`: from text to text with a trained model."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from blockffn.checkpoints.load import load, model_folder
from blockffn.checkpoints.tokenizer import load_tokenizer
from blockffn.inference.backends import make_target
from blockffn.inference.batch import decode_batch
from blockffn.inference.decode import Generation, GenerationSettings, Request, decode
from blockffn.inference.drafts import Draft, make_speculation, resolve_draft
from blockffn.inference.model_target import CachedForward, ModelTarget
from blockffn.inference.speculative.decode import speculate
from blockffn.inference.speculative.lossless import Difference, first_difference
from blockffn.inference.statistics import GenerationStatistics, bits_per_weight
from blockffn.inference.target import Target, check_request
from blockffn.inference.text import Writer
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.ops.device import choose_device


@dataclass(frozen=True)
class Completion:
    """What the model wrote.

    Attributes:
        text: the new text, without special tokens and without the stop string that ended it.
        token_ids: all new tokens, those of the stop string and the end-of-sequence token included.
        finish_reason: `length`, `eos` or `stop`.
        checked: whether plain decoding was asked for the same (`check_lossless`).
        difference: where it then said something else; `None`: nowhere.
    """

    prompt: str
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    statistics: GenerationStatistics
    checked: bool = False
    difference: Difference | None = None


@dataclass(frozen=True)
class _Options:
    """What is asked of a request beside the tokens' settings."""

    settings: GenerationSettings
    stop: tuple[str, ...]
    speculative: bool
    check_lossless: bool


class Engine:
    """A model with its tokenizer and a cache. One request at a time: a new one ends what a stream would still write.

    Keyword arguments of the requests are the fields of `GenerationSettings`, and:

    - `stop`: strings that end the text.
    - `speculative`: whether to use the drafts; default: if the engine has any.
    - `check_lossless`: decode plainly as well, and compare (`Completion.difference`).

    The end-of-sequence tokens are the tokenizer's if none are given.

    Args:
        capacity: tokens that fit, of the prompt and all new ones but the last; default: the model's context.
        target: runs the model; default: `make_target(model)`. Excludes a capacity.
        draft, tree: see `drafts.make_speculation`; no draft: plain decoding.

    Example::

        engine = Engine.load("runs/demo/blockffn", draft="ngram")
        for piece in engine.stream("import ", max_new_tokens=40, temperature=0.0):
            print(piece, end="", flush=True)
    """

    def __init__(
        self,
        model: BlockFFNForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        capacity: int | None = None,
        target: Target | None = None,
        draft: Draft | None = None,
        tree: str | int = "auto",
    ) -> None:
        if target is not None and capacity is not None:
            raise ValueError(f"the target has its own capacity; leave out capacity={capacity}")
        self.model, self.tokenizer = model, tokenizer
        self.target = make_target(model, capacity=capacity) if target is None else target
        self.speculation = None if draft is None else make_speculation(model, self.target, draft, tree=tree)
        self._stream: TextStream | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        capacity: int | None = None,
        backend: str = "auto",
        precision: str = "auto",
        screen_head: str | None = None,
        draft: str | Path = "none",
        tree: str | int = "auto",
    ) -> Engine:
        """The engine of a run's folder or of a model's; on a GPU if there is one and `device` does not say otherwise.

        Args:
            backend, precision, screen_head: see `backends.make_target`.
            draft: `none`, `ngram`, a folder, or `auto`: the folder `draft` of the model's, else n-grams. tree: draft
                tokens per step, or `auto`. See `drafts.make_speculation`.

        Raises:
            ValueError: there is no model or draft that can be read, or the capacity is beyond its context.
        """
        device = choose_device(device)
        model = load(path, device=device, dtype=dtype)
        target = make_target(model, backend=backend, precision=precision, capacity=capacity, screen_head=screen_head)
        tokenizer = load_tokenizer(model_folder(Path(path)))
        chosen = None if draft == "none" else resolve_draft(Path(path), draft) if isinstance(draft, str) else draft
        return cls(model, tokenizer, target=target, draft=chosen, tree=tree)

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
        """Continue a prompt, and get the text while it is written, with drafts in blocks of several tokens.

        Arguments and errors as for `generate`.
        """
        return TextStream(self, prompt, self._options(settings))

    def generate_batch(self, prompts: Sequence[str], **settings: Any) -> list[Completion]:
        """Continue several prompts together, by the model's own modules and without drafts.

        Prompt i draws with `seed + i`; times are those of the whole batch.

        Raises:
            ValueError: as `generate`; or drafts are asked for.
        """
        options = self._options({"speculative": False} | settings)
        if options.speculative or options.check_lossless:
            raise ValueError("a batch is decoded without drafts; continue its prompts one by one to use them")
        ids = [self.encode(prompt) for prompt in prompts]
        writers = [Writer(self.tokenizer, prompt_ids, stops=options.stop) for prompt_ids in ids]
        forward = self.target.forward if isinstance(self.target, ModelTarget) else CachedForward(self.model)
        generations = decode_batch(
            forward, ids, options.settings, capacity=self.target.capacity,
            on_token=lambda row, token: writers[row].add(token),
        )  # fmt: skip
        for writer in writers:
            writer.finish()
        return [self.complete(*parts) for parts in zip(prompts, [w.text for w in writers], ids, generations)]

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, behind the beginning-of-sequence token if the tokenizer has one.

        Raises:
            ValueError: there are no tokens, or the prompt holds what is no text: Python reads bytes that are not UTF-8
                as lone surrogates, from a command line and from a pipe.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            before = ascii(prompt[max(0, error.start - 20) : error.start])
            raise ValueError(f"the prompt is not UTF-8 text behind {before}; convert it to UTF-8 first") from error
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = bos + self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError("the prompt is empty and the tokenizer has no beginning-of-sequence token; give a prompt")
        return ids

    def complete(
        self, prompt: str, text: str, prompt_ids: list[int], generation: Generation, **checked: Any
    ) -> Completion:
        """A request's result, its statistics with those that follow from the model's sizes."""
        config = self.model.config
        bits = bits_per_weight(self.model, config, self.target)
        statistics = generation.statistics.of_model(config, bits_per_weight=bits)
        return Completion(
            prompt, text, prompt_ids, generation.token_ids, generation.finish_reason, statistics, **checked
        )

    def run(self, request: Request, *, speculative: bool) -> Iterator[list[int]]:
        """Continue a request; its new tokens in blocks as they come."""
        if not speculative:
            return decode(self.target, request)
        assert self.speculation is not None
        return speculate(self.target, self.speculation, request)

    def begin(self, stream: TextStream) -> None:
        """End the stream before this one: there is one cache."""
        if self._stream is not None:
            self._stream.close()
        self._stream = stream

    def _options(self, given: dict[str, Any]) -> _Options:
        known = {field.name for field in fields(GenerationSettings)}
        options = {field.name for field in fields(_Options)} - {"settings"}
        unknown = sorted(set(given) - known - options)
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; choose from {', '.join(sorted(known | options))}")
        values = {name: value for name, value in given.items() if name in known}
        if "eos_token_ids" not in values and self.tokenizer.eos_token_id is not None:
            values["eos_token_ids"] = (self.tokenizer.eos_token_id,)
        stop = given.get("stop", ())
        speculative = given.get("speculative", self.speculation is not None)
        check = given.get("check_lossless", False)
        if speculative and self.speculation is None:
            raise ValueError("the engine has no drafts; make it with one, such as draft='ngram'")
        if check and not speculative:
            raise ValueError("check_lossless compares speculative decoding with plain; give the engine a draft")
        settings = GenerationSettings(**values)
        if check and settings.temperature > 0 and self.speculation and not self.speculation.drafter.deterministic:
            raise ValueError(
                "check_lossless compares token by token, which sampling with a drafter that draws at random does not "
                "promise; use a drafter without chance (growth BestNodes) or temperature 0"
            )
        return _Options(settings, (stop,) if isinstance(stop, str) else tuple(stop), speculative, check)


class TextStream:
    """Text of one request, in pieces as it is written; ends with the request."""

    def __init__(self, engine: Engine, prompt: str, options: _Options) -> None:
        self._engine, self._prompt, self._options = engine, prompt, options
        self._ids = engine.encode(prompt)
        self._writer = Writer(engine.tokenizer, self._ids, stops=options.stop)
        check_request(engine.target, self._ids, options.settings.max_new_tokens)
        self._completion: Completion | None = None
        self._pieces = self._write()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def completion(self) -> Completion:
        """The whole. Raises `ValueError` before the stream has ended, or if another request ended it."""
        if self._completion is None:
            raise ValueError("the stream has not been read to its end, or the engine's next request ended it")
        return self._completion

    def close(self) -> None:
        """Write no more."""
        self._pieces.close()

    def _write(self) -> Generator[str]:
        engine, writer, options = self._engine, self._writer, self._options
        engine.begin(self)
        request = Request(self._ids, options.settings, on_token=writer.add)
        for _ in engine.run(request, speculative=options.speculative):
            if piece := writer.take():
                yield piece
        writer.finish()
        if piece := writer.take():
            yield piece
        generation, difference = request.generation(), None
        if options.check_lossless:
            difference = first_difference(engine.target, self._ids, options.settings, generation)
        self._completion = engine.complete(
            self._prompt, writer.text, self._ids, generation, checked=options.check_lossless, difference=difference
        )
