"""Which text is trained on and which is held out, decided while reading and the same at every reading."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from blockffn.data.documents import OWN_SPLITS, Document, read_documents
from blockffn.data.manifest import Source
from blockffn.wording import BYTES_COUNT

TOLERANCE = 3
"""Whole documents are held out if that yields the share asked for within this factor; otherwise each one's end is."""


@dataclass(frozen=True)
class Survey:
    """What a first reading of the corpus found.

    Attributes:
        bytes: UTF-8 bytes of text in `train` and `valid`.
        cut: sources of which the end of every document is held out.
        sample: training texts for the tokenizer.
    """

    bytes: dict[str, int]
    cut: frozenset[str]
    sample: list[str]


@dataclass(frozen=True)
class Corpus:
    """Sources of training text, and how some of it is held out (see `blockffn.data.prepare.prepare`).

    Raises:
        ValueError: no sources, a share outside [0, 1), or one source for both training and validation.
    """

    sources: tuple[str, ...]
    valid_sources: tuple[str, ...] = ()
    valid_fraction: float = 0.01
    text_field: str = "text"
    source_field: str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("no sources are given; name a file, a folder, a dataset, 'stdlib' or 'synthetic'")
        if not 0 <= self.valid_fraction < 1:
            raise ValueError(f"valid_fraction is {self.valid_fraction}; it must be at least 0 and below 1")
        for name in self.valid_sources:
            if name in self.sources and name not in OWN_SPLITS:
                raise ValueError(
                    f"{name!r} is a source and a held-out source at once; held-out text must not be trained on"
                )

    def origins(self) -> tuple[Source, ...]:
        """What the user named, with the splits it feeds."""
        rule = "train and valid" if self._holds_out else "train"
        given = [Source(name, rule) for name in self.sources]
        return (*given, *(Source(name, "valid") for name in self.valid_sources))

    def survey(self, *, sample_bytes: int, progress: bool = False) -> Survey:
        """Read everything once.

        Args:
            sample_bytes: most bytes of training text to keep for the tokenizer.

        Raises:
            ValueError: a source is bad or empty, or nothing is left to train on or to hold out.
        """
        total = {"train": 0, "valid": 0}
        cut = set()
        sample = _Sample(sample_bytes)
        with tqdm(
            desc="reading", unit="B", unit_scale=True, disable=not progress, leave=False, bar_format=BYTES_COUNT
        ) as bar:
            for name in self.sources:
                found, texts = self._survey(name, False, sample_bytes, bar)
                if self._holds_out and name not in OWN_SPLITS and not self._fits(found):
                    cut.add(name)
                    found, texts = self._survey(name, True, sample_bytes, bar)
                for split, num_bytes in found.items():
                    total[split] += num_bytes
                sample.merge(texts)
        total["valid"] += sum(len(d.text.encode()) for name in self.valid_sources for d in self._read(name, "valid"))
        if not total["train"] or (self._holds_out and not total["valid"]):
            raise ValueError(
                f"the corpus of {sum(total.values())} bytes is too small to hold out {self.valid_fraction:.2%} of it; "
                "give more text, a larger valid_fraction, valid_sources, or valid_fraction 0 for no held-out text"
            )
        return Survey(total, frozenset(cut), sample.texts())

    def documents(self, cut: frozenset[str] = frozenset()) -> Iterator[tuple[str, Document]]:
        """Every document with its split, `train` or `valid`, in the order of the sources.

        Args:
            cut: sources of which the end of every document is held out, instead of whole documents.
        """
        for name in self.sources:
            yield from self._documents_of(name, name in cut)
        for name in self.valid_sources:
            yield from (("valid", document) for document in self._read(name, "valid"))

    @property
    def _holds_out(self) -> bool:
        return bool(self.valid_fraction) and not self.valid_sources

    def _survey(self, name: str, cut: bool, sample_bytes: int, bar: tqdm) -> tuple[dict[str, int], _Sample]:
        found = {"train": 0, "valid": 0}
        sample = _Sample(sample_bytes)
        for split, document in self._documents_of(name, cut):
            num_bytes = len(document.text.encode())
            found[split] += num_bytes
            bar.update(num_bytes)
            if split == "train":
                sample.add(document.text, num_bytes)
        return found, sample

    def _fits(self, found: dict[str, int]) -> bool:
        share = found["valid"] / sum(found.values())
        return found["train"] > 0 and self.valid_fraction / TOLERANCE <= share <= self.valid_fraction * TOLERANCE

    def _documents_of(self, name: str, cut: bool) -> Iterator[tuple[str, Document]]:
        if name in OWN_SPLITS:
            for split in ("train", "valid") if self._holds_out else ("train",):
                yield from ((split, document) for document in self._read(name, split))
            return
        for document in self._read(name):
            if not self._holds_out:
                yield "train", document
            elif cut:
                yield from _cut_end(document, self.valid_fraction)
            else:
                yield ("valid" if _hash_share(document.text) < self.valid_fraction else "train"), document

    def _read(self, name: str, split: str | None = None) -> Iterator[Document]:
        return read_documents(name, split=split, text_field=self.text_field, source_field=self.source_field)


def _cut_end(document: Document, share: float) -> Iterator[tuple[str, Document]]:
    """The beginning of a document to train on and its end to hold out; cut at a line end or a space if one is near."""
    text = document.text
    target = round(len(text) * (1 - share))
    nearest = max(0, 2 * target - len(text))  # the end grows to twice its share at most
    cut = (text.rfind("\n", nearest, target) + 1) or (text.rfind(" ", nearest, target) + 1) or target
    for split, part in (("train", text[:cut]), ("valid", text[cut:])):
        if part.strip():
            yield split, Document(part, document.source)


def _hash_share(text: str, key: bytes = b"") -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), key=key, digest_size=6).digest()) / 2**48


class _Sample:
    """The texts with the lowest hashes within a budget of bytes, so that their order does not matter. At least one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._limit = 1.0  # hashes from here on are out
        self._size = 0
        self._kept: list[tuple[float, int, str]] = []  # a heap with the highest hash first

    def add(self, text: str, num_bytes: int) -> None:
        if self._max_bytes:
            self._add(_hash_share(text, b"sample"), num_bytes, text)

    def merge(self, other: _Sample) -> None:
        self._limit = min(self._limit, other._limit)
        for negative_share, num_bytes, text in other._kept:
            self._add(-negative_share, num_bytes, text)

    def texts(self) -> list[str]:
        return [text for negative_share, _, text in sorted(self._kept) if -negative_share < self._limit]

    def _add(self, share: float, num_bytes: int, text: str) -> None:
        if share >= self._limit:
            return
        heapq.heappush(self._kept, (-share, num_bytes, text))
        self._size += num_bytes
        while self._size > self._max_bytes and len(self._kept) > 1:
            negative_share, size, _ = heapq.heappop(self._kept)
            self._limit, self._size = -negative_share, self._size - size
