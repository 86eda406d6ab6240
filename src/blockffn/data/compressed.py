"""Open files that may be compressed, and say plainly when they are damaged."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
READ_BYTES = 1 << 14


@contextmanager
def open_compressed(path: Path) -> Iterator[IO[bytes]]:
    """Bytes of a file, decompressed by its suffix (.gz, .xz, .zst; any other is read as it is).

    Raises:
        ValueError: the file is damaged or cut short, or it is .zst and `zstandard` is not installed.
    """
    suffix = path.suffix.lower()
    damage: tuple[type[Exception], ...] = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)
    with path.open("rb") as raw:
        stream: Any = raw
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif suffix == ".xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115 - `raw` is closed by the context manager
        elif suffix == ".zst":
            zstandard = _import_zstandard(path)
            damage = (*damage, zstandard.ZstdError)
            stream = _CompleteZstd(zstandard, raw)
        try:
            yield cast(IO[bytes], stream)
        except damage as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); fetch or compress it again") from error


def _import_zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"reading {path} needs zstandard: pip install 'blockffn[data]'") from None
    return zstandard


class _CompleteZstd:
    """A .zst file that raises `EOFError` where it ends within a frame; zstandard's own reader stays silent."""

    def __init__(self, zstandard: Any, raw: IO[bytes]) -> None:
        self._new_frame = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._frame = self._new_frame()
        self._raw = raw
        self._inside = False
        self._ready = b""  # decompressed, not yet read
        self._unused = b""  # compressed, behind the end of a frame

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none only at the end."""
        while not self._ready and (data := self._unused or self._raw.read(READ_BYTES)):
            self._ready = self._frame.decompress(data)
            self._inside, self._unused = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = self._new_frame()
        if not self._ready and self._inside:
            raise EOFError("compressed file ended before the end of its last frame")
        text, self._ready = self._ready[:size], self._ready[size:]
        return text
