"""`blockffn inspect`: what a model folder is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockffn.cli.output import check_json, print_lines, write_json
from blockffn.wording import counted


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run, or of a model.", show_default=False)],
    tls: Annotated[
        float, typer.Option(help="Token-level sparsity in percent to reckon with; measure it with blockffn evaluate.")
    ] = 80.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write what is known to this file.")] = None,
) -> None:
    """Say what a folder holds, from headers alone: sizes, parameters, bytes per token, layout, oddities.

    Example: blockffn inspect BlockFFN-XLarge
    """
    from rich.console import Console

    from blockffn.checkpoints.inspect import inspect as inspect_folder

    check_json(json_path)
    found = inspect_folder(path, tls_percent=tls)
    write_json(json_path, found)
    print_lines(Console(highlight=False), _lines(found))


def _draft_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    a, card = found["architecture"], found["card"]
    proposes = f"the {a['draft_vocab_size']:,} most frequent tokens" if a["draft_vocab_size"] else "all tokens"
    target = f", {a['target']}" if a["target"] else ""
    lines = [
        ("kind", f"an EAGLE draft: open it beside its target{target}"),
        ("layers", f"{a['num_hidden_layers'] or 1}, width {a['hidden_size']}, FFN {a['intermediate_size']}, "
                   f"{counted(a['num_attention_heads'], 'head')} on "
                   f"{counted(a['num_key_value_heads'], 'key')}"),
        ("proposes", proposes),
        ("parameters", f"{found['parameters']:,}; embeddings and head are the target's"),
    ]  # fmt: skip
    if card is not None and card["decoding"] is not None and card["decoding"]["tree"] is not None:
        tree, text = card["decoding"]["tree"], card["heldout_text"]
        lines.append(("accepted", f"{tree['acceptance_length']:.2f} tokens per verification in greedy decoding with "
                                  f"trees, {text['acceptance_length']:.2f} with chains on held-out text"))  # fmt: skip
    return lines


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    stored = ", ".join(f"{size / 1e6:,.1f} MB {dtype}" for dtype, size in found["bytes_by_dtype"].items())
    files = f"{len(found['files'])} files ({found['files'][0]} …)" if len(found["files"]) > 1 else found["files"][0]
    storage = ("stored", f"{stored}; {counted(found['tensors'], 'tensor')} in {files}")
    if found["kind"] == "draft":
        return [*_draft_lines(found), storage, *(("odd", oddity) for oddity in found["oddities"])]
    a, counts = found["architecture"], found["parameters"]
    ffn = f"{counted(a['num_experts'], 'expert')} × {a['moe_intermediate_size']}" if a["ffn_type"] == "moe" else "dense"
    attention = f"{a['attention_type'].upper()}, {counted(a['num_attention_heads'], 'head')}"
    if "num_key_value_heads" in a:
        attention += f" on {counted(a['num_key_value_heads'], 'key')}"
    lines = [
        ("layout", f"{found['layout']}; converting changes {found['conversion']}"),
        ("layers", f"{a['num_hidden_layers']} × ({attention}; {ffn}), width {a['hidden_size']}"),
        ("vocabulary", f"{a['vocab_size']:,}, head {'tied' if a['tie_word_embeddings'] else 'of its own'}"),
        ("parameters", f"{counts['total']:,}; {counts['non_embedding']:,} without embeddings"),
        (
            "active",
            f"{found['active_parameters']:,} of the latter for a token that leaves {found['tls_percent']:g} % of the "
            "experts idle",
        ),
        (
            "per token",
            f"{found['bytes_per_token'] / 1e6:,.1f} MB of weights read, {found['bits_per_weight']:.2f} bits each",
        ),
        storage,
    ]
    if found["quantization"]:
        lines.append(("quantised", ", ".join(f"{k} {v}" for k, v in found["quantization"].items())))
    return lines + [("odd", oddity) for oddity in found["oddities"]]
