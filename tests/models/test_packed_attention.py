from __future__ import annotations

import pytest
import torch

from blockffn.models import packed_attention
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.packed_attention import document_offsets
from blockffn.presets import preset_config


def test_offsets_mark_where_documents_and_padding_begin_and_end_with_the_number_of_tokens() -> None:
    ids = torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]])
    offsets = document_offsets(ids)
    assert offsets.dtype == torch.int32
    assert offsets[:5].tolist() == [0, 2, 3, 4, 8]
    assert len(offsets) % 64 == 0
    assert (offsets[4:] == 8).all()


def test_rows_of_one_document_each_are_told_by_the_number_of_offsets() -> None:
    assert document_offsets(torch.zeros(2, 3, dtype=torch.int32)).tolist() == [0, 3, 6]
    rows = torch.zeros(63, 4, dtype=torch.int32)
    assert len(document_offsets(rows)) == 64
    rows[0, 2:] = 1
    assert len(document_offsets(rows)) == 128


def test_the_number_of_offsets_stays_while_the_number_of_documents_changes_a_little() -> None:
    shapes = {len(document_offsets(torch.arange(n).repeat_interleave(64 // n)[None])) for n in (2, 4, 8, 16, 32)}
    assert shapes == {64}


def test_without_documents_it_is_an_error_that_names_the_remedy() -> None:
    model = BlockFFNForCausalLM(preset_config("nano", vocab_size=32, num_hidden_layers=1))
    model.set_attn_implementation(packed_attention.NAME)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("whole_rows", [True, False])
def test_it_equals_masked_attention(attention: str, whole_rows: bool) -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2 if attention == "gqa" else 4}
    config = preset_config("mini", attention_type=attention, num_hidden_layers=2, vocab_size=64, **heads)
    model = BlockFFNForCausalLM(config).cuda()
    ids = torch.randint(0, 64, (2, 128), device="cuda")
    documents = torch.zeros(2, 128, dtype=torch.int32, device="cuda")
    if not whole_rows:
        documents[0, 40:], documents[1, 100:] = 1, -1
    outputs = []
    for name in ("sdpa", packed_attention.NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = model.model(ids, document_ids=documents, use_cache=False).last_hidden_state
        kept = hidden[documents >= 0].float()
        kept.pow(3).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.model.layers.parameters() if p.grad is not None])
        outputs.append((kept, gradients))
    for expected, actual in zip(*outputs):
        assert (actual - expected).norm() / expected.norm() < 3e-2


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_of_one_document_each_attend_as_with_a_causal_mask(compiled: bool) -> None:
    torch.manual_seed(0)
    model = BlockFFNForCausalLM(preset_config("nano", vocab_size=32, num_hidden_layers=2))
    ids, documents = torch.randint(0, 32, (3, 16)), torch.zeros(3, 16, dtype=torch.int32)
    expected = model.model(ids, document_ids=documents, use_cache=False).last_hidden_state
    model.set_attn_implementation(packed_attention.NAME)
    if compiled:
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
    actual = model.model(ids, document_ids=documents, use_cache=False).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
