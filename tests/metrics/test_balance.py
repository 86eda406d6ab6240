"""Load statistics by hand."""

from __future__ import annotations

import math

import pytest

from blockffn.metrics import load_statistics


def test_even_use_is_perfectly_balanced():
    found = load_statistics([25.0] * 4)
    assert (found.coefficient_of_variation, found.max_over_mean, found.dead_experts) == (0.0, 1.0, 0)


def test_uneven_use_by_hand():
    found = load_statistics([0, 0, 2, 6])
    assert found.coefficient_of_variation == pytest.approx(math.sqrt((4 + 4 + 0 + 16) / 4) / 2)
    assert found.max_over_mean == 3.0
    assert found.dead_experts == 2


def test_only_ratios_matter():
    assert load_statistics([1, 2, 5]) == load_statistics([4, 8, 20])


def test_a_layer_without_use_has_no_balance():
    found = load_statistics([0.0, 0.0])
    assert math.isnan(found.coefficient_of_variation)
    assert math.isnan(found.max_over_mean)
    assert found.dead_experts == 2


@pytest.mark.parametrize(("use", "message"), [([], "empty"), ([1, -2], "got -2"), ([math.nan], "got nan")])
def test_bad_use_is_an_error(use, message):
    with pytest.raises(ValueError, match=message):
        load_statistics(use)
