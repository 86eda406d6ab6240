"""`load`: open a model folder, whatever it is, without running anything that the folder brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig

from blockffn.checkpoints.files import CheckpointError, StoredTensor, read_json
from blockffn.checkpoints.layouts import to_ours
from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
from blockffn.checkpoints.quantize import attach, is_packed, pack_model, replace_with_empty, settle, tie
from blockffn.checkpoints.recognise import Folder, recognise
from blockffn.configuration import BlockFFNConfig
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.models.rotary import RotaryEmbedding
from blockffn.ops.device import choose_device
from blockffn.ops.native import empty_huge
from blockffn.wording import BYTES_BAR, counted


def model_folder(path: Path) -> Path:
    """The folder with the weights: `path` itself, or `path/model` of a training run.

    Raises:
        CheckpointError: there is none; the message says what was looked for.
    """
    if path.is_file():
        raise CheckpointError(f"{path} holds no model: it is a file; give the folder of a model or of a run")
    if not path.is_dir():
        hub = f"; download it first: hf download {path} --local-dir {path.name}" if _is_hub_id(path) else ""
        raise CheckpointError(f"{path} holds no model: there is no such folder{hub}")
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "config.json").is_file() or any(path.glob("*.pt")):
        return path
    hint = "; its training has not ended, go on with --resume" if (path / "config.yaml").is_file() else ""
    inner = sorted({file.parents[1] for file in path.glob("*/model/config.json")})
    hint = f"; do you mean {', '.join(map(str, inner[:3]))}?" if inner else hint
    raise CheckpointError(f"{path} holds no model: neither model/config.json nor config.json is there{hint}")


def _is_hub_id(path: Path) -> bool:
    """Whether a path that is not there looks like a name on Hugging Face's hub."""
    return len(path.parts) == 2 and path.parts[0] not in (".", "..", "/") and not Path(path.parts[0]).exists()


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    mmap: bool = False,
    check_finite: bool = False,
    progress: bool = False,
) -> BlockFFNForCausalLM:
    """The model of a folder, in evaluation mode: ours, quantised, as published, or a training checkpoint.

    Weights are read once, into the memory where they stay. Packed weights stay packed on the CPU, where the kernels
    read them, and are unpacked to `dtype` elsewhere.

    Args:
        path: folder of a model or of a training run.
        device: `cpu`, `cuda`, `cuda:1` …; default: the CPU.
        dtype: of the weights that are not packed; `auto` is the dtype of the embeddings' or norms' file.
        mmap: leave weights in the file, to be read when first used, where their dtype and order of axes allow. The file
            must not be overwritten while the model lives.
        check_finite: look for NaN and infinity, which reads every weight.
        progress: show a bar.

    Raises:
        CheckpointError: a `ValueError`. There is no model, or a file is damaged, hostile or another model's; the
            message names file, tensor and remedy.
    """
    folder = recognise(model_folder(Path(path)))
    model = _empty_model(folder, _stored_dtype(folder) if dtype == "auto" else dtype)
    _check_names_and_shapes(folder, model)
    targets = dict(model.named_parameters())
    total = sum(tensor.num_bytes for name, tensor in folder.tensors.items() if name in targets)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", disable=not progress, leave=False, dynamic_ncols=True,
        bar_format=BYTES_BAR, delay=0.3,
    ) as bar:  # fmt: skip
        for name, tensor in folder.tensors.items():
            if name not in targets:
                continue
            weights = _materialise(folder, name, tensor, targets[name], mmap=mmap)
            if check_finite and not _all_finite(weights):
                raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} holds NaN or infinity; training diverged")
            module, _, attribute = name.rpartition(".")
            parameter = nn.Parameter(weights, requires_grad=targets[name].requires_grad)
            setattr(model.get_submodule(module), attribute, parameter)
            bar.update(tensor.num_bytes)
    _finish(folder, model)
    return (model if device is None else move(model, device)).eval()


def _all_finite(weights: Tensor) -> bool:
    """A sum passes NaN and infinity on and takes no memory; only one that overflows needs a look at every weight."""
    return bool(weights.sum().isfinite() or weights.isfinite().all())


def is_foreign(path: Path) -> bool:
    """Whether a local folder says that it is not in our layout, so that Hugging Face cannot open it as ours."""
    file = path / "config.json"
    return file.is_file() and read_json(file).get("model_type") != BlockFFNConfig.model_type


def load_foreign(
    path: Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization_config: BlockFFNQuantizationConfig | None = None,
    **others: Any,
) -> BlockFFNForCausalLM:
    """`load` behind the arguments of `from_pretrained`.

    Raises:
        ValueError: an argument that has no meaning for such a folder, or a `device_map` of several devices.
    """
    neutral = {"local_files_only", "trust_remote_code", "attn_implementation", "low_cpu_mem_usage", "use_safetensors"}
    if set(others) - neutral:
        raise ValueError(
            f"{path} is no folder in this package's layout, and {sorted(set(others) - neutral)[0]!r} cannot be used "
            "with it; convert it first: blockffn convert"
        )
    if (device_map is not None and not isinstance(device_map, (str, torch.device, int))) or device_map == "auto":
        raise ValueError(f"device_map must be one device for {path}, got {device_map!r}; convert it first")
    model = load(path, dtype="auto" if dtype is None else dtype)
    if others.get("attn_implementation"):
        model.set_attn_implementation(others["attn_implementation"])
    if quantization_config is not None:
        pack_model(model, quantization_config)
        attach(model, quantization_config)
    return model if device_map is None else move(model, device_map)


def move(model: BlockFFNForCausalLM, device: str | torch.device | int) -> BlockFFNForCausalLM:
    """Move a model; packed weights are unpacked for any device but the CPU, which alone has kernels for them.

    Raises:
        ValueError: the device is not there.
    """
    if isinstance(device, str):
        choose_device(device)
    if torch.device(device).type != "cpu":
        if is_packed(model):
            model.dequantize()
        model.to(device)  # type: ignore[arg-type]
    return model


def _empty_model(folder: Folder, dtype: torch.dtype | str) -> BlockFFNForCausalLM:
    """The folder's model without memory for its weights."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    try:
        with torch.device("meta"):
            model = BlockFFNForCausalLM(folder.config)
            model.to(dtype)  # type: ignore[arg-type]
        RotaryEmbedding(folder.config)  # what it reads from the configuration is checked by building it
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder.path / 'config.json'} describes no model that can be built: {type(error).__name__} {error}"
        ) from error
    with torch.device("meta"):
        if folder.quantization is not None:
            config = _quantization(folder)
            replace_with_empty(model, config)
            attach(model, config)
        tie(model)
    model.config.dtype = dtype
    return model


def _quantization(folder: Folder) -> BlockFFNQuantizationConfig:
    try:
        return BlockFFNQuantizationConfig.from_dict(dict(folder.quantization or {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder.path / 'config.json'} has a wrong quantization_config: {error}") from error


def _stored_dtype(folder: Folder) -> torch.dtype:
    """Of the final norm: every layout has it and none packs it."""
    norm = folder.tensors.get("model.norm.weight")
    return norm.dtype if norm is not None and norm.dtype.is_floating_point else torch.float32


def check_folder(folder: Folder) -> None:
    """Raise `CheckpointError` where `load` would, as far as headers tell."""
    _check_names_and_shapes(folder, _empty_model(folder, torch.float32))


def _check_names_and_shapes(folder: Folder, model: nn.Module) -> None:
    """Every tensor of the model is there, none is left over, and each has its shape."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    files = sorted({tensor.file.name for tensor in folder.tensors.values()})
    missing = [name for name in expected if name not in folder.tensors]
    if missing:
        raise CheckpointError(
            f"{folder.path} ({', '.join(files[:3])}) lacks {counted(len(missing), 'tensor')}, the first "
            f"{missing[0]!r}; download the missing files or copy them again"
        )
    surplus = [tensor for name, tensor in folder.tensors.items() if name not in expected]
    if surplus:
        raise CheckpointError(
            f"{surplus[0].file} holds {counted(len(surplus), 'tensor')} that the model does not have, the first "
            f"{surplus[0].name!r}; config.json belongs to another model"
        )
    for name, shape in expected.items():
        tensor = folder.tensors[name]
        try:
            found = tuple(_in_our_axes(folder, name, tensor, torch.empty(tensor.shape, device="meta")).shape)
        except ValueError as error:
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} {error}") from error
        if found != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {found}, config.json makes it {shape}; "
                "one of them belongs to another model"
            )
        if (tensor.dtype == torch.uint8) != name.endswith(".packed"):
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, which weights are not")


def _in_our_axes(folder: Folder, name: str, stored: StoredTensor, tensor: Tensor) -> Tensor:
    return tensor if folder.layout == "ours" else to_ours(tensor, name, stored.name, folder.experts)


def _materialise(folder: Folder, name: str, stored: StoredTensor, target: Tensor, *, mmap: bool) -> Tensor:
    """The weights of a parameter, in its dtype and with our axes."""
    if mmap:
        return _in_our_axes(folder, name, stored, stored.map()).to(target.dtype).contiguous()
    out = empty_huge(target.numel() * target.element_size()).view(target.dtype).view(target.shape)
    if stored.dtype == target.dtype:
        probe = _in_our_axes(folder, name, stored, torch.empty(stored.shape, device="meta"))
        if probe.is_contiguous():
            stored.read_into(out)
            return out
    weights = _in_our_axes(folder, name, stored, stored.read())
    if weights.ndim == 3 and weights.stride(0) == weights.shape[1] * weights.stride(1):
        out.flatten(0, 1).copy_(weights.flatten(0, 1))  # PyTorch transposes two dimensions several times faster
    else:
        out.copy_(weights)
    return out


def _finish(folder: Folder, model: BlockFFNForCausalLM) -> None:
    """What is not stored: tied weights, rotary frequencies, generation defaults, the folder's name."""
    tie(model)
    if folder.quantization is not None:
        settle(model)
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            inv_freq, module.attention_scaling = module.initial_frequencies(folder.config)
            module.inv_freq, module.original_inv_freq = inv_freq, inv_freq.clone()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
    defaults = folder.path / "generation_config.json"
    if defaults.is_file():
        try:
            model.generation_config = GenerationConfig.from_dict(read_json(defaults))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{defaults} is wrong ({error}); correct or remove it") from error
    model.config._name_or_path = model.name_or_path = str(folder.path)
