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
        self._pending = b""
        self._inside = False

    def read(self, size: int = -1) -> bytes:
        """At least one byte, unless the file has ended; `size` is a hint."""
        while True:
            data = self._pending or self._raw.read(1 << 17)
            if not data:
                if self._inside:
                    raise EOFError("compressed file ended before the end of its last frame")
                return b""
            text = self._frame.decompress(data)
            self._inside = not self._frame.eof
            self._pending = b""
            if self._frame.eof:
                self._pending = self._frame.unused_data
                self._frame = self._new_frame()
            if text:
                return text
