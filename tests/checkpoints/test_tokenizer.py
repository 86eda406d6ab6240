"""The tokenizer of a published folder is its tokenizer.json, whatever its configurations say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from blockffn.checkpoints.tokenizer import load_tokenizer
from blockffn.data.tokenizer import load_tokenizer as load_tokenizer_of_data
from tests.checkpoints import published

TEXTS = ("import os", "   three  spaces\n\tand a tab", "<用户> 日本 <AI>", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A SentencePiece-like tokenizer behind the class and the programs that the published configurations name."""
    published.write_bin(tmp_path, published.weights("small"), published.config("small"))
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", "<用户>", "<AI>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special + pieces, show_progress=False)
    made.train_from_iterator(["import os", "   three   spaces"] * 9, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "legacy": True, "sp_model_kwargs": {},
        "auto_map": {"AutoTokenizer": ["tokenization_minicpm.MiniCPMTokenizer", None]},
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenization_minicpm.py").write_text("raise SystemExit('executed')\n")
    return tmp_path


@pytest.mark.parametrize("loader", [load_tokenizer, load_tokenizer_of_data])
def test_tokens_are_those_of_the_file(folder: Path, loader, capfd: pytest.CaptureFixture[str]) -> None:
    expected, found = Tokenizer.from_file(str(folder / "tokenizer.json")), loader(folder)
    for text in TEXTS:
        assert found(text).input_ids == expected.encode(text).ids
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)
    assert capfd.readouterr() == ("", "")  # nor does it complain about the model's type


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=f"{folder} holds no tokenizer that can be read"):
        load_tokenizer(folder)


def test_a_folder_without_one_says_what_to_copy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    published.write_bin(tmp_path, published.weights("small"), published.config("small"))
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer; copy tokenizer.json"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr() == ("", "")
