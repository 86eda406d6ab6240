"""What `blockffn convert --from-dense` does, and its receipt on the screen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockffn.wording import counting_bar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

KINDS = ("gated", "plain", "none")


def convert_dense(
    path: Path,
    out: Path,
    *,
    data: Path | None,
    experts: str,
    num_experts: int,
    sparsity: float,
    calibration_tokens: int,
    dtype: str,
    max_shard_size: str,
    device: str | None,
    console: Console,
) -> dict[str, Any]:
    """Write the dense model of `path` to `out` in our architecture, with experts unless `experts` is `none`.

    Returns:
        The receipt: what was made, and a line for each stage.

    Raises:
        ValueError: an option is wrong, or the model cannot be converted.
    """
    if experts not in KINDS:
        raise ValueError(f"--experts must be one of {', '.join(KINDS)}; got {experts!r}")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32 or bfloat16, got {dtype!r}")
    if experts != "none" and data is None:
        raise ValueError(
            "routers are fitted on text: --data FOLDER (blockffn prepare … --tokenizer MODEL), or --experts none"
        )
    import torch
    from tqdm import tqdm

    from blockffn.checkpoints.convert import new_folder
    from blockffn.ops.device import choose_device
    from blockffn.sparsify.convert import Regrouping, regroup
    from blockffn.sparsify.dense import open_dense
    from blockffn.sparsify.passages import check_tokenizer, read_passages
    from blockffn.sparsify.receipt import compare

    device = choose_device(device)
    model, tokenizer, difference = open_dense(path)
    model.to(device=device)  # type: ignore[call-arg]
    receipt: dict[str, Any] = {"source": str(path), "experts": experts, "load_difference": difference, "stages": []}
    if data is not None:
        check_tokenizer(data, tokenizer)
        length = min(512, model.config.max_position_embeddings)
        held_out = read_passages(data, "valid", length=length, num_tokens=max(length, calibration_tokens // 4))
        receipt["stages"] = [compare("loaded", model, model, held_out).to_dict()]
    if data is not None and experts != "none":
        wanted = Regrouping(num_experts, gated=experts == "gated", tls=sparsity)
        wanted.check(model.config)
        calibration = read_passages(data, "train", length=length, num_tokens=calibration_tokens)
        with tqdm(
            total=model.config.num_hidden_layers,
            desc="making experts",
            bar_format=counting_bar("layers"),
            leave=False,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        ) as bar:
            model, stages = regroup(model, wanted, calibration, held_out, on_layer=lambda _: bar.update())
        receipt["stages"] += [stage.to_dict() for stage in stages]
        receipt |= {"num_experts": num_experts, "sparsity": sparsity, "calibration_tokens": calibration_tokens}
    if dtype == "bfloat16":
        model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    with new_folder(out) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
    return receipt


def receipt_table(receipt: dict[str, Any]) -> Table:
    """Stages, with how far each is from the dense model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("stage")
    for heading in ("logits differ", "KL, nats", "perplexity", "TLS"):
        table.add_column(heading, justify="right")
    for stage in receipt["stages"]:
        tls = "" if stage["tls"] is None else f"{stage['tls']:.1f} %"
        # A model that is only loaded differs from the original by what loading changes.
        difference = receipt["load_difference"] if stage["name"] == "loaded" else stage["difference"]
        table.add_row(
            stage["name"], f"{difference:.2e}", f"{stage['divergence']:.2e}", f"{stage['perplexity']:.2f}", tls
        )
    return table
