from __future__ import annotations

import numpy as np
import pytest

from blockffn.metrics.bimodality import two_component_fit


def test_two_separate_groups_are_found_with_their_shares() -> None:
    random = np.random.default_rng(0)
    fit = two_component_fit([*random.normal(12, 1, 600), *random.normal(22, 2, 400)])
    assert fit is not None
    assert fit.means == pytest.approx((12, 22), abs=0.3)
    assert fit.deviations == pytest.approx((1, 2), abs=0.2)
    assert fit.shares == pytest.approx((0.6, 0.4), abs=0.02)
    assert fit.bimodal


def test_one_group_is_not_bimodal() -> None:
    fit = two_component_fit(np.random.default_rng(1).normal(20, 3, 2000).tolist())
    assert fit is not None
    assert not fit.bimodal


def test_a_skewed_group_needs_two_components_but_has_one_peak() -> None:
    fit = two_component_fit(np.random.default_rng(2).gamma(3, 1, 3000).tolist())
    assert fit is not None
    assert fit.bic_gain > 10
    assert fit.modes == 1
    assert not fit.bimodal


def test_too_few_or_equal_numbers_have_no_fit_and_nan_is_an_error() -> None:
    assert two_component_fit([1.0, 2.0]) is None
    assert two_component_fit([3.0] * 50) is None
    with pytest.raises(ValueError, match="finite"):
        two_component_fit([float("nan")] * 20)
