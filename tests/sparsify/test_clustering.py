from __future__ import annotations

import pytest
import torch

from blockffn.sparsify.clustering import balanced_clusters


def test_clusters_are_of_equal_size_whatever_the_rows() -> None:
    for features in (torch.randn(48, 5), torch.zeros(48, 5), torch.ones(48, 1)):
        assert balanced_clusters(features, 6).bincount(minlength=6).tolist() == [8] * 6


def test_rows_that_point_the_same_way_stay_together() -> None:
    kinds = torch.arange(4).repeat_interleave(6)[torch.randperm(24)]
    features = 10 * torch.eye(4)[kinds] + 0.1 * torch.randn(24, 4)
    clusters = balanced_clusters(features, 4)
    assert {tuple(clusters[kinds == kind].unique().tolist()) for kind in range(4)} == {
        (c,) for c in clusters.unique().tolist()
    }


def test_the_same_rows_give_the_same_clusters() -> None:
    features = torch.randn(60, 7)
    assert torch.equal(balanced_clusters(features, 5), balanced_clusters(features.clone(), 5))


def test_a_number_that_does_not_divide_is_refused_with_the_nearest_one_that_does() -> None:
    with pytest.raises(ValueError, match=r"48 rows cannot be split into 7 equal clusters; nearest: [68]"):
        balanced_clusters(torch.randn(48, 3), 7)
