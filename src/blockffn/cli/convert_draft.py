"""What `blockffn convert` does with a draft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LAYOUTS = ("ours", "published", "eagle3")


def convert_draft(
    path: Path, out: Path, *, to: str, target: Path | None, dtype: str, console: Console
) -> dict[str, Any]:
    """Write the draft of `path` to the new folder `out`, and say what the layout does not express.

    Returns:
        Plain data: `bytes`, and for EAGLE-3 `exact` and `inexact`.

    Raises:
        ValueError: an option is wrong, or draft and target do not fit together.
    """
    if to not in LAYOUTS:
        raise ValueError(f"a draft is written as {', '.join(LAYOUTS)}; got {to!r}")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32 or bfloat16, got {dtype!r}")
    if target is None:
        raise ValueError(f"{path} is a draft, which lives on its target's embeddings and sizes; add --target FOLDER")
    import torch

    from blockffn.checkpoints.convert import copy_companions, new_folder
    from blockffn.checkpoints.draft import load_draft, save_draft
    from blockffn.checkpoints.eagle3 import check_eagle3, write_eagle3
    from blockffn.checkpoints.load import load, model_folder
    from blockffn.checkpoints.quantize import is_packed
    from blockffn.checkpoints.recognise import recognise

    receipt: dict[str, Any] = {"layout": to}
    draft = load_draft(path, recognise(model_folder(target)).config)
    stored = next(draft.parameters()).dtype if dtype == "auto" else getattr(torch, dtype)
    if to == "eagle3":
        check_eagle3(draft)
    with new_folder(out) as folder:
        if to == "eagle3":
            model = load(target)
            if is_packed(model):
                model.dequantize()
            receipt |= write_eagle3(draft, model, folder, dtype=stored)
            copy_companions(model_folder(target), folder)
        else:
            save_draft(folder, draft, dtype=stored, published=to == "published")
    receipt["bytes"] = (out / "model.safetensors").stat().st_size
    console.print(f"draft of {receipt['bytes'] / 1e6:.1f} MB in {out}, layout {to}", soft_wrap=True)
    for heading, name in (("the same in EAGLE-3's terms", "exact"), ("not the same", "inexact")):
        for line in receipt.get(name, ()):
            console.print(f"  {heading}: {line}", soft_wrap=True, highlight=False)
    return receipt
