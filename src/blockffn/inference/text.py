"""Tokens to text as it is written: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# A tokenizer may write a token differently at the start of a text (SentencePiece drops a space), so new tokens are
# decoded after some of the prompt's.
CONTEXT_TOKENS = 8


class Detokenizer:
    """Text of tokens that arrive one by one; special tokens have none.

    A character whose bytes are spread over tokens appears with the last of them. The pieces end to end are the text of
    all tokens after the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._held = list(prompt_ids[-CONTEXT_TOKENS:])
        self._shown = self._text(self._held)

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._held.append(token)
        text = self._text(self._held)
        if text.endswith("\ufffd"):
            return ""
        return self._show(text)

    def finish(self) -> str:
        """The rest, bytes that make no character included."""
        return self._show(self._text(self._held))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._held = self._held[-CONTEXT_TOKENS:]
        self._shown = self._text(self._held)
        return piece

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Passes text on until one of `stops` occurs; what may be the beginning of one is held back.

    Attributes:
        found: the stop string that occurred first, or `None` so far. It and what follows are not passed on.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """The text that can be shown now."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if places:
            place, self.found = min(places)
            shown, self._held = self._held[:place], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Writer:
    """The text of one request, from its tokens, up to the first stop string.

    Attributes:
        text: what can be shown so far.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], *, stops: Sequence[str] = ()
    ) -> None:
        self.text = ""
        self._detokenizer, self._stops = Detokenizer(tokenizer, prompt_ids), StopStrings(stops)
        self._shown = 0

    def add(self, token: int) -> bool:
        """Write a token; says whether a stop string has ended the text."""
        self.text += self._stops.add(self._detokenizer.add(token))
        return self._stops.found is not None

    def finish(self) -> None:
        """Write what was held back."""
        self.text += self._stops.add(self._detokenizer.finish()) + self._stops.finish()

    def take(self) -> str:
        """What was written since the last call."""
        piece, self._shown = self.text[self._shown :], len(self.text)
        return piece
