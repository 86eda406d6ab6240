from __future__ import annotations

import math

import numpy as np
import pytest

from blockffn.data.synthetic import SyntheticLanguage, synthetic_texts

SMALL = SyntheticLanguage(num_topics=3, words_per_topic=10, branching=4, switch_probability=0.1, seed=5)


def test_entropy_equals_its_closed_form() -> None:
    """Whether to switch, then either which of the other topics' words, or which successor."""
    p = SMALL.switch_probability
    switch = -p * math.log(p) - (1 - p) * math.log(1 - p)
    _, probabilities = SMALL._chains
    successor = SMALL.stationary_distribution() @ -(probabilities * np.log(probabilities)).sum(axis=1)
    expected = switch + p * math.log(2 * 10) + (1 - p) * successor
    assert SMALL.entropy_per_token() == pytest.approx(expected, rel=1e-12)


def test_a_uniform_language_has_the_entropy_of_its_choices() -> None:
    language = SyntheticLanguage(num_topics=2, words_per_topic=1, branching=1, switch_probability=0.25)
    assert language.entropy_per_token() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_the_true_model_scores_samples_at_the_entropy() -> None:
    ids = SMALL.sample(400, 500, seed=1)
    losses = -np.log(SMALL.transition_matrix()[ids[:, :-1], ids[:, 1:]])
    assert losses.mean() == pytest.approx(SMALL.entropy_per_token(), rel=0.01)


def test_documents_begin_and_stay_in_the_stationary_distribution() -> None:
    pi = SMALL.stationary_distribution()
    np.testing.assert_allclose(pi @ SMALL.transition_matrix(), pi, atol=1e-12)
    ids = SMALL.sample(40_000, 2, seed=2)
    for column in ids.T:
        np.testing.assert_allclose(np.bincount(column, minlength=30) / len(column), pi, atol=0.01)


def test_topics_switch_at_the_given_rate() -> None:
    topics = SMALL.topics_of(SMALL.sample(400, 500, seed=3))
    assert (topics[:, 1:] != topics[:, :-1]).mean() == pytest.approx(0.1, abs=0.005)


def test_rows_of_the_transition_matrix_are_distributions() -> None:
    matrix = SMALL.transition_matrix()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    assert (matrix >= 0).all()


def test_bits_per_byte_follow_from_the_spelling() -> None:
    text = SMALL.spell(SMALL.sample(1, 100, seed=4)[0])
    assert len(text.encode()) == 500
    assert SMALL.entropy_per_byte() == pytest.approx(SMALL.entropy_per_token() * 100 / math.log(2) / 500)


def test_every_word_has_its_own_spelling() -> None:
    assert len(set(SMALL.words)) == SMALL.vocab_size == 30


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    same = SyntheticLanguage(num_topics=3, words_per_topic=10, branching=4, switch_probability=0.1, seed=5)
    np.testing.assert_array_equal(SMALL.sample(3, 20, seed=1), same.sample(3, 20, seed=1))
    assert (SMALL.sample(3, 20, seed=1) != SMALL.sample(3, 20, seed=2)).any()
    assert same.words != SyntheticLanguage(num_topics=3, words_per_topic=10, seed=6).words


def test_training_and_held_out_documents_differ() -> None:
    train, valid = set(synthetic_texts("train")), set(synthetic_texts("valid"))
    assert len(train) == 2000
    assert len(valid) == 100
    assert not train & valid
    assert len(list(synthetic_texts())) == 2100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_topics": 1}, "num_topics is 1"),
        ({"branching": 65}, "branching is 65.*words_per_topic = 64"),
        ({"switch_probability": 1.0}, "switch_probability is 1.0"),
        ({"num_topics": 1000}, "64000 words are asked for"),
    ],
)
def test_impossible_languages_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticLanguage(**change)  # type: ignore[arg-type]


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="no split 'dev'"):
        next(synthetic_texts("dev"))
