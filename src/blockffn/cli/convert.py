"""`blockffn convert`: a model folder written anew, quantised or in another layout."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from blockffn.cli.output import check_json, print_next, print_table, table_console, write_json
from blockffn.cli.weights import weights_table

_Format = Annotated[str | None, typer.Option(help="int8, int4 or keep.", show_default="as --quantize")]
_TableFormat = Annotated[
    str | None, typer.Option(help="int8, int4 or keep. A tied head is stored once.", show_default="int8")
]


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write. It is made whole or not at all.")],
    to: Annotated[
        str, typer.Option(help="Layout: ours, published (SparseLLM/BlockFFN's); of drafts also eagle3.")
    ] = "ours",
    target: Annotated[
        Path | None, typer.Option(help="A draft's target, if MODEL is a draft.", show_default=False)
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Store weights in int8 or int4.", show_default=False)] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    ffn: _Format = None,
    attention: _Format = None,
    embeddings: _TableFormat = None,
    lm_head: _TableFormat = None,
    dtype: Annotated[str, typer.Option(help="Of the other weights: float32, bfloat16; auto: as they are.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 15MB.")] = "5GB",
    from_dense: Annotated[
        bool, typer.Option("--from-dense", help="The model is dense and Llama-like: make experts of its neurons.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Prepared text that routers are fitted on (--from-dense).", show_default=False)
    ] = None,
    experts: Annotated[
        str, typer.Option(help="gated, plain, or none: only our architecture (--from-dense).")
    ] = "gated",
    num_experts: Annotated[int, typer.Option(help="Experts a layer (--from-dense).")] = 24,
    sparsity: Annotated[float, typer.Option(help="TLS to start with, in percent (--from-dense).")] = 50.0,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to fit on (--from-dense).", min=64)] = 8192,
    device: Annotated[str | None, typer.Option(help="Where to fit (--from-dense): cpu or cuda.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the receipt to this file.")] = None,
) -> None:
    """Write a model in safetensors, on request quantised, and say what each part costs in bytes and in accuracy.

    Opens runs, models, the published repositories as downloaded and their training checkpoints; --to published writes
    the layout of those repositories.

    A draft (blockffn train-draft) is converted beside its --target; --to eagle3 writes the layout of other engines, and
    says what it does not express.

    --from-dense turns any Llama-like model into one with experts, and prints how far each stage is from the original.

    Example: blockffn convert runs/demo/blockffn --quantize int4 --out runs/demo-int4
    """
    from blockffn.checkpoints.convert import convert as convert_folder
    from blockffn.checkpoints.convert import receipt
    from blockffn.checkpoints.quantization_config import BlockFFNQuantizationConfig
    from blockffn.checkpoints.tokenizer import has_tokenizer

    check_json(json_path)
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", max_shard_size.upper()):
        raise ValueError(f"--max-shard-size {max_shard_size} is no size; write one like 15MB or 5GB")
    parts = {"ffn": ffn, "attention": attention, "embeddings": embeddings, "lm_head": lm_head}
    chosen = {part: None if value == "keep" else value for part, value in parts.items() if value is not None}
    if quantize is None and chosen:
        raise ValueError(f"--{next(iter(chosen)).replace('_', '-')} says how to quantise a part; add --quantize int8")
    console = table_console()
    if from_dense:
        if quantize is not None or to != "ours":
            raise ValueError("--from-dense writes our layout, not quantised; convert its result once more")
        from blockffn.cli.from_dense import convert_dense, receipt_table

        made = convert_dense(
            path, out, data=data, experts=experts, num_experts=num_experts, sparsity=sparsity,
            calibration_tokens=calibration_tokens, dtype=dtype, max_shard_size=max_shard_size, device=device,
            console=console,
        )  # fmt: skip
        write_json(json_path, made)
        if made["stages"]:
            console.print(receipt_table(made))
        console.print(f"written to {out}; its logits differed by {made['load_difference']:.1e} when it was loaded")
        print_next(console, f"blockffn train --start-from {out} --teacher DENSE --data FOLDER --out RUN")
        return
    quantization = None
    if quantize is not None:
        quantization = BlockFFNQuantizationConfig.preset(quantize, group_size=group_size, **chosen)
    from blockffn.checkpoints.draft import is_draft_folder

    if is_draft_folder(path):
        from blockffn.cli.convert_draft import convert_draft

        if quantize is not None:
            raise ValueError(f"{path} is a draft, which is not quantised; leave --quantize {quantize} out")
        write_json(json_path, convert_draft(path, out, to=to, target=target, dtype=dtype, console=console))
        return
    if target is not None:
        raise ValueError(f"--target {target} is for drafts, and {path} is none")
    rows = convert_folder(
        path,
        out,
        to=to,
        quantization=quantization,
        dtype=dtype,
        max_shard_size=max_shard_size,
        progress=sys.stderr.isatty(),
    )
    write_json(json_path, receipt(rows))
    print_table(console, weights_table(rows))
    files = sorted(out.glob("*.safetensors"))
    largest = max(file.stat().st_size for file in files)
    total = sum(file.stat().st_size for file in files)
    in_files = f"{len(files)} files, the largest {largest / 1e6:.1f} MB" if len(files) > 1 else "1 file"
    console.print(f"{total / 1e6:.1f} MB in {in_files}; written to {out}", soft_wrap=True)
    if has_tokenizer(out):
        print_next(console, f"blockffn generate {out}")
    else:
        console.print(f"no tokenizer was there to copy; put tokenizer.json into {out} to generate text", style="dim")
