"""Load a synthetic model folder in a fresh process: time against a plain read of its files, and peak memory.

    python benchmarks/load.py --size 3b --json benchmarks/results/load.json

The folder holds arbitrary bf16 values in the shapes of a preset, in our layout, as published, and as published in .bin
files (shards as `torch.save` writes them), and is deleted at the end. Each way of loading runs in its own process, once
with the files dropped from the page cache (cold) and once with them in it (warm); imports are not timed. Columns:

    s           seconds until the model is returned
    GB/s        bytes of weights over that time; `read` is a plain read of the files into one buffer of 16 MiB
    peak GB     growth of the process's resident memory, pages mapped from files included, at its highest
    / weights   the same over the bytes of the weights: 1 is one copy
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2 << 30
WAYS = {"read": "ours", "from_pretrained": "ours", "load": "ours", "load mmap": "ours", "load published": "published",
        "load .bin": ".bin"}  # fmt: skip
"""What is measured, and the layout that it reads; ways of one layout stand together, which is written once."""


def write_folder(folder: Path, size: str, layout: str) -> int:
    """Write shards of arbitrary bf16 values without holding a model; returns the bytes of the weights."""
    import torch

    from blockffn.checkpoints.layouts import published_name
    from blockffn.checkpoints.publish import published_config
    from blockffn.models.causal_lm import BlockFFNForCausalLM
    from blockffn.presets import preset_config

    config = preset_config(size)
    with torch.device("meta"):
        model = BlockFFNForCausalLM(config)
    model.tie_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    folder.mkdir(parents=True)
    if layout in ("published", ".bin"):
        two = {name: _published_shape(name, shape) for name, shape in shapes.items()}
        shapes = {published_name(name): shape for name, shape in two.items()}
        (folder / "config.json").write_text(json.dumps(published_config(config, dtype="bfloat16")))
    else:
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
    noise = (torch.randn(16 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(_bytes(s) for s in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    stem, suffix = ("pytorch_model", ".bin") if layout == ".bin" else ("model", ".safetensors")
    weight_map = {}
    for i, shard in enumerate(shards):
        file = folder / f"{stem}-{i + 1:05d}-of-{len(shards):05d}{suffix}"
        weight_map |= dict.fromkeys(shard, file.name)
        with file.open("wb") as stream:
            if layout == ".bin":
                torch.save({name: _repeated(noise, shape) for name, shape in shard.items()}, stream)
            else:
                _write_safetensors(stream, shard, noise.view(torch.uint8).numpy())
            stream.flush()
            os.fsync(stream.fileno())
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return sum(_bytes(shape) for shape in shapes.values())


def _write_safetensors(stream: BinaryIO, shapes: dict[str, tuple[int, ...]], noise: Any) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + _bytes(shape)]}
        offset += _bytes(shape)
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
        left = _bytes(shape)
        while left:
            left -= stream.write(noise[: min(left, noise.nbytes)].data)


def _repeated(noise: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of its own memory, filled with `noise` as often as it fits."""
    import torch

    filled = torch.empty(shape, dtype=noise.dtype)
    for piece in filled.view(-1).split(noise.numel()):
        piece.copy_(noise[: piece.numel()])
    return filled


def _published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name.endswith("routed_experts.up_proj"):
        return shape[0] * shape[1], shape[2]
    if name.endswith("routed_experts.down_proj"):
        return shape[2], shape[0] * shape[1]
    return shape


def _bytes(shape: tuple[int, ...]) -> int:
    count = 2
    for n in shape:
        count *= n
    return count


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))


def drop_from_cache(folder: Path) -> None:
    for file in weight_files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(way: str, folder: Path) -> dict[str, float]:
    """In this process: seconds, and growth of the peak of resident memory in bytes."""
    if way == "read":
        buffer = bytearray(16 << 20)
        begin = time.perf_counter()
        for file in weight_files(folder):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
        return {"seconds": time.perf_counter() - begin, "peak_bytes": len(buffer)}
    import torch

    import blockffn

    loader: Any = blockffn.load
    cls: Any = blockffn.BlockFFNForCausalLM
    before = _resident("VmRSS")
    begin = time.perf_counter()
    if way == "from_pretrained":
        model = cls.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        model = loader(folder, mmap=way == "load mmap")
    seconds = time.perf_counter() - begin
    peak = _resident("VmHWM") - before
    with torch.no_grad():  # that the model is there
        assert model(torch.arange(4)[None]).logits.shape[1] == 4
    return {"seconds": seconds, "peak_bytes": peak}


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="3b", help="preset")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/blockffn-load"), help="made, and deleted at the end")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists")
    rows = []
    try:
        weights = write_folder(arguments.folder / "ours", arguments.size, "ours")
        print(f"{arguments.size}: {weights / 1e9:.2f} GB of weights")
        print(f"{'':>16}  cache       s   GB/s  peak GB  / weights")
        for way, layout in WAYS.items():
            folder = arguments.folder / layout
            if not folder.exists():
                for earlier in arguments.folder.iterdir():
                    shutil.rmtree(earlier)
                write_folder(folder, arguments.size, layout)
            for cache in ("cold", "warm"):
                if cache == "cold":
                    drop_from_cache(folder)
                command = [sys.executable, __file__, "--measure", way, str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                row = {"way": way, "cache": cache, **json.loads(done.stdout.splitlines()[-1])}
                row["gigabytes_per_second"] = weights / row["seconds"] / 1e9
                row["copies"] = row["peak_bytes"] / weights
                rows.append(row)
                print(
                    f"{way:>16}  {cache}  {row['seconds']:6.2f} {row['gigabytes_per_second']:6.2f} "
                    f"{row['peak_bytes'] / 1e9:8.2f} {row['copies']:10.2f}",
                    flush=True,
                )
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    if arguments.json:
        machine = {"processor": _processor(), "threads": os.cpu_count(), "python": platform.python_version(),
                   "date": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
        result = {"machine": machine, "size": arguments.size, "weight_bytes": weights, "results": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
