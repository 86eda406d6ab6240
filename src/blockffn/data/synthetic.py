"""A small synthetic language whose entropy is known exactly, with topics that switch.

Every topic has words of its own and a Markov chain over them; after each word the topic may change. A word tells its
topic, so the text is a Markov chain over words, and its entropy rate is that of the chain: no model can do better.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SPLITS = {"train": (2000, 1), "valid": (100, 2)}  # number of documents, seed
WORDS_PER_DOCUMENT = 256


@dataclass(frozen=True)
class SyntheticLanguage:
    """Topics of Markov chains over words.

    Token ids are words: id `k * words_per_topic + i` is word `i` of topic `k`. After each word, the topic changes with
    probability `switch_probability` to a uniformly chosen other topic, at a uniformly chosen word; otherwise one of
    `branching` successors in the topic follows, with probabilities that are uneven and fixed.

    Raises:
        ValueError: a size that is not possible, naming it.
    """

    num_topics: int = 8
    words_per_topic: int = 64
    branching: int = 6
    switch_probability: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_topics < 2:
            raise ValueError(f"num_topics is {self.num_topics}; a language that switches topics needs at least 2")
        if not 1 <= self.branching <= self.words_per_topic:
            raise ValueError(
                f"branching is {self.branching}; it must be between 1 and words_per_topic = {self.words_per_topic}"
            )
        if not 0 < self.switch_probability < 1:
            raise ValueError(f"switch_probability is {self.switch_probability}; it must lie between 0 and 1")
        if self.vocab_size > self._num_spellings:
            raise ValueError(f"{self.vocab_size} words are asked for, there are only {self._num_spellings} spellings")

    @property
    def vocab_size(self) -> int:
        return self.num_topics * self.words_per_topic

    @property
    def _num_spellings(self) -> int:
        return (len(CONSONANTS) * len(VOWELS)) ** 2

    @cached_property
    def words(self) -> list[str]:
        """Spelling of each id: four letters, all different."""
        syllables = [c + v for c in CONSONANTS for v in VOWELS]
        spellings = [a + b for a, b in itertools.product(syllables, repeat=2)]
        order = np.random.default_rng([self.seed, 1]).permutation(len(spellings))
        return [spellings[i] for i in order[: self.vocab_size]]

    @cached_property
    def _chains(self) -> tuple[IntArray, FloatArray]:
        """Successors `[words, branching]` within the topic and their probabilities."""
        rng = np.random.default_rng([self.seed, 2])
        shape = (self.vocab_size, self.words_per_topic)
        successors = rng.random(shape).argsort(axis=1)[:, : self.branching]
        topic_start = np.arange(self.vocab_size) // self.words_per_topic * self.words_per_topic
        return successors + topic_start[:, None], rng.dirichlet(np.ones(self.branching), size=self.vocab_size)

    def transition_matrix(self) -> FloatArray:
        """`[words, words]`; row `w` is the distribution of the word after `w`."""
        successors, probabilities = self._chains
        topics = self.topics_of(np.arange(self.vocab_size))
        other = topics[:, None] != topics[None, :]
        matrix = other * (self.switch_probability / (self.vocab_size - self.words_per_topic))
        np.put_along_axis(matrix, successors, (1 - self.switch_probability) * probabilities, axis=1)
        return matrix

    def stationary_distribution(self) -> FloatArray:
        """`[words]`; how often each word occurs. Documents begin in it."""
        system = self.transition_matrix().T - np.eye(self.vocab_size)
        system[-1] = 1.0  # one equation follows from the others; in its place, probabilities sum to 1
        return np.linalg.solve(system, np.eye(self.vocab_size)[-1])

    def entropy_per_token(self) -> float:
        """Entropy rate in nats a word, the lowest cross entropy that any model of words can reach."""
        matrix = self.transition_matrix()
        logs = np.log(matrix, out=np.zeros_like(matrix), where=matrix > 0)
        return float(-self.stationary_distribution() @ (matrix * logs).sum(axis=1))

    def entropy_per_byte(self) -> float:
        """Entropy rate in bits a byte of the text that `spell` makes: every word is four letters and a space."""
        return self.entropy_per_token() / np.log(2) / 5

    def topics_of(self, ids: IntArray) -> IntArray:
        """Topic of each word; any shape."""
        return ids // self.words_per_topic

    def sample(self, num_documents: int, num_words: int, *, seed: int) -> IntArray:
        """`[num_documents, num_words]` ids of independent documents."""
        rng = np.random.default_rng([self.seed, 3, seed])
        successors, probabilities = self._chains
        edges = probabilities.cumsum(axis=1)[:, :-1]
        ids = np.empty((num_documents, num_words), dtype=np.int64)
        word = rng.choice(self.vocab_size, size=num_documents, p=self.stationary_distribution())
        for t in range(num_words):
            ids[:, t] = word
            choice = (rng.random(num_documents)[:, None] >= edges[word]).sum(axis=1)
            within = successors[word, choice]
            step = rng.integers(1, self.num_topics, num_documents)
            topic = (self.topics_of(word) + step) % self.num_topics
            elsewhere = topic * self.words_per_topic + rng.integers(0, self.words_per_topic, num_documents)
            word = np.where(rng.random(num_documents) < self.switch_probability, elsewhere, within)
        return ids

    def spell(self, ids: IntArray) -> str:
        """One document `[num_words]` as text: words that each end with a space."""
        return "".join(self.words[i] + " " for i in ids)


def synthetic_texts(split: str | None = None) -> Iterator[str]:
    """Documents of the default language.

    Args:
        split: `train` (2.6 MB), `valid` (0.13 MB), or `None` for both, `train` first.

    Raises:
        ValueError: an unknown split.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"the synthetic corpus has no split {split!r}; use 'train' or 'valid'")
    language = SyntheticLanguage()
    for name in SPLITS if split is None else (split,):
        num_documents, seed = SPLITS[name]
        for ids in language.sample(num_documents, WORDS_PER_DOCUMENT, seed=seed):
            yield language.spell(ids)
