from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockffn.data.batch import Batch
from blockffn.data.loader import BatchLoader, iterate_split, shuffled
from blockffn.data.manifest import load_manifest
from blockffn.data.packed_split import EMPTY_ROW, PackedSplit
from blockffn.data.prepare import prepare
from tests.data.conftest import sentences, write_json_lines
from tests.data.test_prepare import documents_of

T, ALIGN = 64, 16
GOLDEN = [0, 7, 4, 2, 1, 6, 5, 3]


def make_loader(*folders: Path, **options: Any) -> BatchLoader:
    settings: dict[str, Any] = {"sequence_length": T, "global_batch_size": 4, "align": ALIGN, "seed": 7} | options
    return BatchLoader(dict.fromkeys(folders, 1.0), **settings)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(vars(a).values(), vars(b).values()))


def concatenate(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*(vars(batch).values() for batch in batches))))


def segments_of(batch: Batch) -> list[tuple[int, ...]]:
    """Token ids of every segment."""
    found = []
    for ids, documents in zip(batch.input_ids, batch.document_ids):
        found += [tuple(ids[documents == d].tolist()) for d in range(int(documents.max()) + 1)]
    return found


def expected_segments(folder: Path, split: str) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + T]) for ids in documents_of(folder, split) for i in range(0, len(ids), T)]


def row_keys(batch: Batch) -> list[bytes]:
    return [row.numpy().tobytes() for row in batch.input_ids]


def test_one_pass_holds_every_token_of_the_split_once(prepared: Path) -> None:
    batch = concatenate(list(iterate_split(prepared, "train", sequence_length=T, batch_size=8, align=ALIGN)))
    assert Counter(segments_of(batch)) == Counter(expected_segments(prepared, "train"))
    assert (batch.document_ids >= 0).sum() == load_manifest(prepared).splits["train"].tokens


def test_tensors_of_a_batch_agree_with_each_other(prepared: Path) -> None:
    batch = concatenate(list(iterate_split(prepared, "train", sequence_length=T, batch_size=8, align=ALIGN)))
    assert [value.dtype for value in vars(batch).values()] == [
        torch.int64,
        torch.int64,
        torch.int64,
        torch.int32,
        torch.int16,
    ]
    for ids, labels, positions, documents, sources in zip(*vars(batch).values()):
        start = 0
        for t in range(T):
            padding = documents[t] < 0
            if not padding and (t == 0 or documents[t - 1] != documents[t]):
                assert t % ALIGN == 0
                start = t
            first = not padding and t == start
            assert positions[t] == t - start
            assert labels[t] == (-100 if padding or first else ids[t])
            assert ids[t] == 0 if padding else ids[t] > 0
            assert sources[t] == (-1 if padding else 0)


def test_the_last_batch_of_a_pass_is_filled_up_with_empty_rows(prepared: Path) -> None:
    rows = PackedSplit(prepared, "valid", sequence_length=T, align=ALIGN).num_rows
    batches = list(iterate_split(prepared, "valid", sequence_length=T, batch_size=rows - 1, align=ALIGN))
    assert [batch.input_ids.shape for batch in batches] == [(rows - 1, T)] * 2
    empty = batches[1].rows(1, rows - 1)
    assert empty.num_target_tokens == 0
    assert (empty.document_ids == -1).all()
    assert (empty.source_ids == -1).all()
    assert batches[1].rows(0, 1).num_target_tokens > 0


def test_a_limited_pass_takes_rows_from_all_over_the_split(prepared: Path) -> None:
    packed = PackedSplit(prepared, "train", sequence_length=T, align=ALIGN)
    (batch,) = iterate_split(prepared, "train", sequence_length=T, batch_size=4, align=ALIGN, max_rows=4)
    expected = np.array([0, packed.num_rows // 4, packed.num_rows // 2, packed.num_rows * 3 // 4])
    assert equal(batch, packed.batch(expected))


def test_a_limit_beyond_the_split_gives_the_split(prepared: Path) -> None:
    options = {"sequence_length": T, "batch_size": 8, "align": ALIGN}
    limited = list(iterate_split(prepared, "valid", max_rows=10_000, **options))
    assert equal(concatenate(limited), concatenate(list(iterate_split(prepared, "valid", **options))))


def test_an_empty_row_is_padding(prepared: Path) -> None:
    batch = PackedSplit(prepared, "valid", sequence_length=T, align=ALIGN).batch(np.array([EMPTY_ROW]))
    assert batch.input_ids.tolist() == [[0] * T]
    assert batch.position_ids.tolist() == [list(range(T))]


def test_every_row_comes_once_an_epoch_in_a_new_order(prepared: Path) -> None:
    packed = PackedSplit(prepared, "train", sequence_length=T, align=ALIGN)
    loader = make_loader(prepared, global_batch_size=1)
    epochs = [[row_keys(loader.next())[0] for _ in range(packed.num_rows)] for _ in range(2)]
    in_order = row_keys(packed.batch(np.arange(packed.num_rows)))
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(in_order)
    assert epochs[0] != epochs[1]
    assert epochs[0] != in_order


def test_another_seed_gives_another_order(prepared: Path) -> None:
    assert not equal(make_loader(prepared).next(), make_loader(prepared, seed=8).next())
    assert equal(make_loader(prepared).next(), make_loader(prepared).next())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_rank_sees(prepared: Path, other: Path, world_size: int) -> None:
    whole = make_loader(prepared, other)
    ranks = [make_loader(prepared, other, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(20):
        assert equal(whole.next(), concatenate([loader.next() for loader in ranks]))


def test_a_resumed_loader_goes_on_with_the_exact_batch(prepared: Path, other: Path) -> None:
    loader = make_loader(prepared, other)
    for _ in range(37):
        loader.next()
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make_loader(prepared, other)
    resumed.load_state_dict(state)
    ranks = [make_loader(prepared, other, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(100):
        batch = loader.next()
        assert equal(batch, resumed.next())
        assert equal(batch, concatenate([rank.next() for rank in ranks]))
    assert loader.state_dict() == resumed.state_dict() == ranks[1].state_dict()


def test_a_saved_state_does_not_move_with_the_loader(prepared: Path) -> None:
    loader = make_loader(prepared)
    state = loader.state_dict()
    saved = copy.deepcopy(state)
    loader.next()
    assert state == saved
    other_loader = make_loader(prepared)
    other_loader.load_state_dict(state)
    other_loader.next()
    assert state == saved


def test_a_state_of_other_data_is_refused_with_both_fingerprints(prepared: Path, other: Path) -> None:
    fingerprints = [load_manifest(folder).fingerprint for folder in (prepared, other)]
    with pytest.raises(ValueError, match=rf"fingerprints was \['{fingerprints[0]}'\] and is \['{fingerprints[1]}'\]"):
        make_loader(other).load_state_dict(make_loader(prepared).state_dict())


def test_a_state_of_another_order_is_refused_with_both_values(prepared: Path) -> None:
    state = make_loader(prepared).state_dict()
    with pytest.raises(ValueError, match="seed was 7 and is 8"):
        make_loader(prepared, seed=8).load_state_dict(state)
    with pytest.raises(ValueError, match="sequence_length was 64 and is 128"):
        make_loader(prepared, sequence_length=128).load_state_dict(state)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_mixture_has_the_shares_of_tokens_asked_for(prepared: Path, other: Path, share: float) -> None:
    loader = BatchLoader(
        {prepared: 3 * (1 - share), other: 3 * share}, sequence_length=T, global_batch_size=10, align=ALIGN, seed=0
    )
    assert loader.source_names == ("cats", "dogs")
    counts = torch.zeros(2)
    for _ in range(200):
        sources = loader.next().source_ids
        counts += torch.stack([(sources == s).sum() for s in range(2)])
    assert float(counts[1] / counts.sum()) == pytest.approx(share, abs=0.01)


def test_any_stretch_of_rows_has_its_shares(prepared: Path, other: Path) -> None:
    loader = make_loader(prepared, other)
    drawn = [loader._draw()[0] for _ in range(400)]
    share = loader._row_shares[1]
    assert all(abs(sum(drawn[i : i + 50]) - 50 * share) < 2 for i in range(350))


def test_folders_with_different_tokenizers_do_not_mix(prepared: Path, tmp_path: Path) -> None:
    prepare([write_json_lines(tmp_path / "a.jsonl", sentences(9, seed=1))], tmp_path / "b", vocab_size=265)
    with pytest.raises(ValueError, match="were tokenised differently"):
        make_loader(prepared, tmp_path / "b")


def test_a_split_that_is_not_there_is_named(prepared: Path) -> None:
    with pytest.raises(ValueError, match=r"has no split 'test' but \['train', 'valid'\]"):
        make_loader(prepared, split="test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 6, "world_size": 4}, "global_batch_size 6 is not a positive multiple of world_size 4"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not among the 2 ranks"),
        ({"sequence_length": 100}, "sequence_length 100 is not a multiple of the chunk length 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(prepared: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(prepared, **options)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_not_positive_are_refused(prepared: Path, weight: float) -> None:
    with pytest.raises(ValueError, match="weights must be positive"):
        BatchLoader({prepared: weight}, sequence_length=T, global_batch_size=1, seed=0)
    with pytest.raises(ValueError, match="no data folders"):
        BatchLoader({}, sequence_length=T, global_batch_size=1, seed=0)


def test_a_pass_without_rows_is_refused(prepared: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 0"):
        iterate_split(prepared, "valid", sequence_length=T, batch_size=0)


def test_the_shuffle_is_a_permutation_that_never_changes() -> None:
    """Checkpoints depend on it: a change of these numbers breaks every resumed run."""
    assert shuffled(8, 0, 0, 0).tolist() == GOLDEN
    assert sorted(shuffled(1000, 1, 2, 3).tolist()) == list(range(1000))
    assert shuffled(1000, 1, 2, 3).tolist() != shuffled(1000, 1, 3, 2).tolist()
    assert shuffled(4, -1).tolist() == shuffled(4, 2**64 - 1).tolist()
