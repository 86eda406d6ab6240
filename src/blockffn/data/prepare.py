"""Text to a prepared folder: a tokenizer, token shards for training and held-out text, and a manifest.

The text is read twice. The first reading counts it, samples it for the tokenizer and finds bad input before hours are
spent; the second one tokenises. Memory stays constant: a sample of the text, a batch of documents, one shard's index.
The folder appears whole or not at all.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from blockffn.data.corpus import Corpus, Survey
from blockffn.data.documents import Document
from blockffn.data.manifest import FILE_NAME, Manifest, is_prepared_folder, load_manifest
from blockffn.data.shards import ShardWriter
from blockffn.data.tokenizer import (
    load_tokenizer,
    token_byte_lengths,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from blockffn.wording import BYTES_BAR

__all__ = ["Manifest", "load_manifest", "prepare"]

SAMPLE_BYTES = 16 << 20
BATCH_BYTES = 4 << 20
MAX_SOURCES = np.iinfo(np.int16).max


def prepare(
    sources: Sequence[str | Path],
    out_dir: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 8192,
    valid_fraction: float = 0.01,
    valid_sources: Sequence[str | Path] | None = None,
    text_field: str = "text",
    source_field: str | None = None,
    shard_tokens: int = 1 << 26,
    progress: bool = False,
) -> Manifest:
    """Tokenise `sources` (see `read_documents`) into `out_dir`, which training reads. Same text, same files.

    What is held out for validation: `valid_sources` if given; otherwise of each source whole documents, chosen by a
    hash of their text (so copies stay together), or the end of each document where there are too few for that. The
    built-in corpora bring their own held-out part, which is never trained on.

    Args:
        tokenizer: an existing tokenizer (see `load_tokenizer`); `None` trains one of `vocab_size` ids on a sample of
            the training text of at most 16 MiB.
        valid_fraction: share of the documents to hold out; 0 holds out nothing.
        valid_sources: sources that are held out as a whole.
        text_field, source_field: see `read_documents`.
        shard_tokens: tokens after which a new shard begins.
        progress: show a progress bar.

    Returns:
        The manifest that was written.

    Raises:
        ValueError: bad input (see `read_documents`), a split without text, a vocabulary that is too small, or an
            `out_dir` with files of somebody else.
        OSError: the folder cannot be written, for example because the disk is full; nothing is left behind.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; it must be positive")
    out = Path(out_dir)
    _check_target(out)
    corpus = Corpus(
        sources=tuple(map(str, sources)),
        valid_sources=tuple(map(str, valid_sources or ())),
        valid_fraction=valid_fraction,
        text_field=text_field,
        source_field=source_field,
    )
    survey = corpus.survey(sample_bytes=0 if tokenizer else SAMPLE_BYTES, progress=progress)
    encoder = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(survey.sample, vocab_size=vocab_size)
    survey.sample.clear()
    with _whole_or_nothing(out) as folder:
        return _write(corpus, survey, encoder, folder, shard_tokens, progress)


def _write(
    corpus: Corpus, survey: Survey, tokenizer: PreTrainedTokenizerFast, folder: Path, shard_tokens: int, progress: bool
) -> Manifest:
    vocab_size = vocabulary_size(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    names: dict[str, int] = {}
    writers = {name: ShardWriter(folder, name, dtype=dtype, shard_tokens=shard_tokens) for name in survey.bytes}
    try:
        with tqdm(
            total=sum(survey.bytes.values()),
            desc="tokenising",
            unit="B",
            unit_scale=True,
            disable=not progress,
            leave=False,
            dynamic_ncols=True,
            bar_format=BYTES_BAR,
        ) as bar:
            for batch in _batches(corpus.documents(survey.cut)):
                encoded = _encode(tokenizer, [document.text for _, document, _ in batch])
                for (split, document, num_bytes), ids in zip(batch, encoded):
                    source = names.setdefault(document.source, len(names))
                    if source > MAX_SOURCES:
                        raise ValueError(f"more than {MAX_SOURCES} sources; source_field must name few of them")
                    writers[split].add([bos, *ids, eos], source=source, num_bytes=num_bytes)
                    bar.update(num_bytes)
        splits = {name: writer.finish(list(names)) for name, writer in writers.items() if survey.bytes[name]}
    finally:
        for writer in writers.values():
            writer.abandon()
    manifest = Manifest(
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=vocab_size,
        token_dtype=dtype.name,
        bos_token_id=cast(int, bos),
        eos_token_id=cast(int, eos),
        pad_token_id=cast(int, pad),
        source_names=tuple(names),
        splits=splits,
        origins=corpus.origins(),
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    np.save(folder / "token_bytes.npy", token_byte_lengths(tokenizer))
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document, int]]]:
    """Documents with their sizes in bytes, in batches that keep all cores busy and fit in memory."""
    batch, size = [], 0
    for split, document in documents:
        num_bytes = len(document.text.encode())
        batch.append((split, document, num_bytes))
        size += num_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[list[int]]:
    """Ids of each text. Text that spells a special token stays text: documents hold no control tokens."""
    backend = cast(Any, tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))


def _check_target(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not is_prepared_folder(out):
        raise ValueError(f"{out} holds files that `blockffn prepare` did not write; choose an empty or a new folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder")


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` at the end, or vanishes if something goes wrong."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.absolute().parent))
    except OSError as error:
        raise _explained(error, out) from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _replace(folder, out)
    except OSError as error:
        raise _explained(error, out) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    old = folder.with_suffix(".old")
    out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _explained(error: OSError, out: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full; nothing was left behind. Free some space or choose a folder on another disk"
        return OSError(error.errno, reason, str(out))
    return error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
