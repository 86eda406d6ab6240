"""The tensors of a folder, without trusting it: names, shapes and dtypes first, bytes when asked for.

Headers are bounded in size and checked against the file before any memory is asked for; an index may only name files
beside it; a `.bin` is a zip archive of stored (not compressed) records whose pickle is read by PyTorch's restricted
unpickler, which refuses everything that is not a tensor. Nothing that a folder brings along is executed.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockffn.errors import UserFacingError
from blockffn.ops.native import empty_huge

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")  # in the order of preference
MAX_HEADER_BYTES = 16 << 20  # of safetensors, pickles and JSON: 100,000 tensors
# Memory that is touched for the first time costs as much as reading: several readers do both at once.
PIECE_BYTES = 16 << 20
READERS = 4
_COPY_AGAIN = "download or copy the file again"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class CheckpointError(UserFacingError, ValueError):
    """A model folder cannot be opened; the message names file, tensor and remedy."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `read` fills memory of the same dtype and shape; `map` is the file's own, read when touched.

    A mapped tensor is private: writing to it does not change the file. Overwriting the file changes or kills it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    map: Callable[[], Tensor]
    offset: int | None = None  # of the bytes in the file, where it is known

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """A copy in memory of its own."""
        if self.offset is None:
            return self.map().clone()
        out = empty_huge(self.num_bytes).view(self.dtype).view(self.shape)
        self.read_into(out)
        return out

    def read_into(self, out: Tensor) -> None:
        """Read into contiguous memory of the same dtype and number of elements, without a second copy.

        Raises:
            CheckpointError: the file became shorter since it was opened.
        """
        assert out.is_contiguous()
        assert out.dtype == self.dtype
        assert out.numel() == math.prod(self.shape)
        if self.offset is None:
            out.copy_(self.map().view(out.shape))
            return
        buffer = memoryview(out.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        pieces = [(start, buffer[start : start + PIECE_BYTES]) for start in range(0, self.num_bytes, PIECE_BYTES)]
        if len(pieces) == 1:
            self._read_piece(*pieces[0])
        elif pieces:
            with ThreadPoolExecutor(READERS) as readers:
                list(readers.map(self._read_piece, *zip(*pieces)))

    def _read_piece(self, start: int, buffer: memoryview) -> None:
        with self.file.open("rb", buffering=0) as file:
            file.seek((self.offset or 0) + start)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise CheckpointError(f"{self.file} ended within tensor {self.name!r}; {_COPY_AGAIN}")
                buffer = buffer[count:]


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder, by name. Reads headers only.

    Preferred in this order: `model.safetensors.index.json`, one `.safetensors`, `pytorch_model.bin.index.json`, one
    `.bin`, one `.pt`.

    Raises:
        CheckpointError: there are no weights, it is unclear which, or a file is damaged or hostile.
    """
    for suffix in WEIGHT_SUFFIXES:
        indices = sorted(folder.glob(f"*{suffix}.index.json"))
        if indices:
            return _open_sharded(_only(indices, folder))
        files = sorted(folder.glob(f"*{suffix}"))
        if files:
            return open_file(_only(files, folder))
    raise CheckpointError(
        f"{folder} holds no weights: no .safetensors, .bin or .pt file; download the weights beside config.json"
    )


def open_file(file: Path) -> dict[str, StoredTensor]:
    """All tensors of one `.safetensors`, `.bin` or `.pt` file. Errors as for `open_tensors`."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; download or copy it beside the other files")
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
        CheckpointError: it is missing, larger than 16 MiB, or no JSON object.
    """
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes, too many for a configuration")
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); {_COPY_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; {_COPY_AGAIN}")
    return content


def read_frequencies(file: Path) -> list[int]:
    """The list of token ids in a small pickle or PyTorch file, read without running anything.

    Raises:
        CheckpointError: it is too large, or holds anything but whole numbers.
    """
    if file.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes, too many for a list of tokens")
    try:
        if zipfile.is_zipfile(file):
            _check_archive(file)
            ids = torch.load(file, map_location="cpu", weights_only=True)
        else:
            with file.open("rb") as stream:
                ids = _NothingButNumbers(stream).load()
    except Exception as error:  # damaged pickles fail in ways that are not listed
        raise CheckpointError(f"{file} is no list of token ids ({error}); {_COPY_AGAIN}") from error
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise CheckpointError(f"{file} holds something else than a list of token ids")
    return ids


class _NothingButNumbers(pickle.Unpickler):
    """Reads plain values; every import, and so every call, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")


def _only(files: list[Path], folder: Path) -> Path:
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(f"{folder} holds {len(files)} candidates for the weights ({names}); leave one")
    return files[0]


def _open_sharded(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; {_COPY_AGAIN}")
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        # A plain name only: anything else could reach files outside of the folder.
        plain = isinstance(shard, str) and shard not in ("", "..") and not set("/\\\0") & set(shard)
        if not plain:
            raise CheckpointError(f"{index} places tensor {name!r} in {shard!r}, which is not a file beside it")
        if shard not in shards:
            shards[shard] = open_file(index.parent / shard)
        if name not in shards[shard]:
            raise CheckpointError(f"{index.parent / shard} lacks tensor {name!r} that {index.name} places there")
        tensors[name] = shards[shard][name]
    return tensors


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise CheckpointError(f"{file} is truncated or no safetensors file ({size:,} bytes); {_COPY_AGAIN}")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{file} claims a header of {length:,} bytes, more than any model needs")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error}); {_COPY_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a damaged header; {_COPY_AGAIN}")
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _safetensors_entry(file, name, entry, 8 + length, size)
    if sum(tensor.num_bytes for tensor in tensors.values()) > size - 8 - length:
        raise CheckpointError(f"{file} uses the same bytes for several tensors; refused")
    return tensors


def _safetensors_entry(file: Path, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} describes tensor {name!r} wrongly; {_COPY_AGAIN}") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file} stores tensor {name!r} as {dtype!r}; only {', '.join(DTYPES)} are read")
    if not whole or end - begin != math.prod(shape) * DTYPES[dtype].itemsize or len(shape) > 8:
        raise CheckpointError(f"{file} gives tensor {name!r} a shape that its bytes do not have; {_COPY_AGAIN}")
    if base + end > size:
        raise CheckpointError(
            f"{file} is truncated: tensor {name!r} ends at byte {base + end:,} of {size:,}; {_COPY_AGAIN}"
        )

    def map_() -> Tensor:
        flat = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)[base + begin : base + end]
        if (base + begin) % DTYPES[dtype].itemsize:
            flat = flat.clone()  # written without padding; such a tensor cannot be used where it lies
        return flat.view(DTYPES[dtype]).view(shape)

    return StoredTensor(name, DTYPES[dtype], shape, file, map_, base + begin)


def _open_torch(file: Path) -> dict[str, StoredTensor]:
    _check_archive(file)
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].split("\n")[0]
        raise CheckpointError(
            f"{file} holds more than tensors ({reason}); reading it would run its code, so it is refused. "
            "Ask its author for safetensors"
        ) from error
    except Exception as error:  # a damaged archive fails in ways that PyTorch does not list
        raise CheckpointError(f"{file} is damaged ({str(error).splitlines()[0][:200]}); {_COPY_AGAIN}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file} holds no dictionary of tensors; it is not a model's weights")
    for name, value in content.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not dense or value.is_quantized:
            raise CheckpointError(f"{file} holds {name!r}, which is not a dense tensor; it is not a model's weights")
    offsets = _offsets(file, content)
    tensors = {
        name: StoredTensor(name, value.dtype, tuple(value.shape), file, value.detach, offsets.get(name))
        for name, value in content.items()
    }
    # Repeated rows and shared storages let a small file claim any size. Tied weights share theirs once.
    repeated = [n for n, value in content.items() if tensors[n].num_bytes > value.untyped_storage().nbytes()]
    if repeated or sum(tensor.num_bytes for tensor in tensors.values()) > 2 * file.stat().st_size:
        which = f"tensor {repeated[0]!r}" if repeated else "its tensors"
        raise CheckpointError(f"{file} claims more values for {which} than it stores; refused")
    return tensors


def _offsets(file: Path, content: dict[str, Tensor]) -> dict[str, int]:
    """Where the values of mapped tensors lie in an archive, so that reading them does not map a second copy.

    All storages are parts of one mapping, in which the first lies where the archive's first record of values does.
    Where that does not fit (other byte order, unused records), nothing is said.
    """
    records = set()
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        for record in archive.infolist():
            if "/data/" in record.filename:
                stream.seek(record.header_offset + 26)
                name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
                records.add(record.header_offset + 30 + name + extra)
    storages = {name: value.untyped_storage().data_ptr() for name, value in content.items() if value.numel()}
    if not records or not storages:
        return {}
    base = min(storages.values()) - min(records)
    if any(pointer - base not in records for pointer in storages.values()):
        return {}
    return {name: content[name].data_ptr() - base for name in storages if content[name].is_contiguous()}


def _check_archive(file: Path) -> None:
    """Refuse archives whose records are compressed or claim more bytes than the file has."""
    try:
        records = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else None
    except Exception as error:  # a damaged directory fails in ways that zipfile does not list
        raise CheckpointError(f"{file} is damaged ({error}); {_COPY_AGAIN}") from error
    if records is None:
        raise CheckpointError(
            f"{file} is truncated, or of the format before PyTorch 1.6, which cannot be checked before it is read; "
            "copy it again, or save it again with a newer PyTorch"
        )
    size = file.stat().st_size
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
            raise CheckpointError(f"{file} claims {record.file_size:,} bytes in record {record.filename!r}; refused")
        if record.filename.endswith(".pkl") and record.file_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{file} has a directory of {record.file_size:,} bytes, more than any model needs")
    if sum(record.file_size for record in records) > size:
        raise CheckpointError(f"{file} claims more bytes than it has; refused")
