"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer beside the weights, without running anything that the folder brings along.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers of unknown models fail in ways that are not listed
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} holds no tokenizer that can be read ({reason}); copy its files there") from error
    return tokenizer
