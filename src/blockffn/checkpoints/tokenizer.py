"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def has_tokenizer(folder: Path) -> bool:
    """Whether a file of a tokenizer lies there, readable or not."""
    return any((folder / name).is_file() for name in FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer beside the weights, without running anything that the folder brings along.

    A `tokenizer.json` is complete and is used as it is. Hugging Face's automatic choice of a class is for folders
    without one: it asks config.json, which in published folders names programs, and its classes build some
    tokenizers anew, with other tokens.

    Raises:
        ValueError: there is none that can be read.
    """
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} holds no tokenizer; copy tokenizer.json and tokenizer_config.json there")
    family = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = family.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers of unknown models fail in ways that are not listed
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} holds no tokenizer that can be read ({reason}); copy its files there") from error
    return tokenizer
