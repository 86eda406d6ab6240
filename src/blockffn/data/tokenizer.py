"""Train a byte-level BPE tokenizer, open an existing one, and count the bytes behind each token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
SPACE = "▁"
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_TOKEN_BYTES = 32


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. Ids 0, 1, 2 are `<pad>`, `<bos>`, `<eos>`.

    Any text survives encoding and decoding exactly. Text that spells a special token is encoded as plain text. Like
    most language models' tokenizers, it puts `<bos>` before a text unless called with `add_special_tokens=False`.

    Args:
        texts: sample of the corpus; read once.
        vocab_size: number of ids, at least 259. A small corpus can yield fewer.

    Raises:
        ValueError: `vocab_size` has no room for every byte and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and 3 special tokens need at least {MIN_VOCAB_SIZE}")
    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, SPECIAL_TOKENS.index(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerFast:
    """Open a tokenizer: its folder or `tokenizer.json`, a prepared folder or a run that holds one, or a hub id.

    Raises:
        ValueError: there is none, it marks no end of a document, or it is not backed by the library `tokenizers`.
    """
    name = str(path_or_id)
    path = Path(name)
    if path.is_file() and path.suffix == ".json":
        path = path.parent
    folders = [folder for folder in (path, path / "tokenizer", path / "model") if (folder / "tokenizer.json").is_file()]
    if path.exists() and not folders and not (path / "tokenizer_config.json").is_file():
        raise ValueError(f"{name} holds no tokenizer: no tokenizer.json is there, in tokenizer/ or in model/")
    try:
        if folders:  # a tokenizer.json is complete; the automatic choice would ask the model's config.json
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folders[0], local_files_only=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=path.exists())
    except Exception as error:  # a missing file, a bad id, no network: all mean that there is no such tokenizer
        raise ValueError(f"cannot load a tokenizer from {name!r} ({type(error).__name__}: {error})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {name!r} is not backed by the library `tokenizers`; convert it to a tokenizer.json"
        )
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise ValueError(
            f"tokenizer {name!r} has neither a BOS nor an EOS token, so documents cannot be told apart; set one"
        )
    return cast(PreTrainedTokenizerFast, tokenizer)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ids that an embedding needs: the highest id plus one, also where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int32]:
    """`[V]` UTF-8 bytes of text behind each token id, 0 for special tokens and unused ids.

    Exact for byte-level tokenizers (GPT-2, Llama 3, Qwen, ours) and for those of SentencePiece's kind (Llama 2, Gemma),
    the latter up to the space that they may put before a text.

    Raises:
        ValueError: the tokenizer is of another kind (WordPiece, for example), whose tokens do not spell the text.
    """
    state = json.loads(cast(Any, tokenizer.backend_tokenizer).to_str())
    kinds = _kinds(state.get("decoder")) | _kinds(state.get("pre_tokenizer"))
    byte_level = "ByteLevel" in kinds
    spells_spaces = "Metaspace" in kinds or SPACE in json.dumps(state.get("normalizer"), ensure_ascii=False)
    if not byte_level and not spells_spaces:
        raise ValueError(
            f"cannot count bytes per token of a tokenizer with decoder and pre-tokenizer {sorted(kinds)}: "
            "its tokens do not spell the text; use a byte-level or SentencePiece tokenizer"
        )
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int32)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token) if byte_level else _sentencepiece_bytes(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        lengths[index] = 0 if added.special else len(added.content.encode())
    for index in tokenizer.all_special_ids:
        lengths[index] = 0
    return lengths


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of what decides the ids of a text, whatever version saved it."""
    state = json.loads(cast(Any, tokenizer.backend_tokenizer).to_str())
    parts = {key: state.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    parts["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _kinds(component: Any) -> set[str]:
    """Names of all types in a (possibly nested) component of a tokenizer."""
    if isinstance(component, dict):
        own = {component["type"]} if isinstance(component.get("type"), str) else set()
        return own.union(*map(_kinds, component.values()))
    if isinstance(component, list):
        return set[str]().union(*map(_kinds, component))
    return set()


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # a single byte, as byte fallback spells it
        return 1
    return len(token.replace(SPACE, " ").encode())
