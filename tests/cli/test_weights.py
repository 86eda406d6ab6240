"""What formats do to weights, as tables for 80 columns."""

from __future__ import annotations

import io

from rich.console import Console

from blockffn.cli.output import print_table
from blockffn.cli.weights import errors_table, share_lines, weights_table
from blockffn.configuration import BlockFFNConfig
from blockffn.evaluation.formats import format_errors, stored_weights
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.ops.quantization import StoredWeight

SIZES = {
    "vocab_size": 400, "hidden_size": 128, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 16,
    "num_attention_heads": 2, "attention_type": "gqa", "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def shown(rows: list[StoredWeight], width: int = 80) -> str:
    file = io.StringIO()
    print_table(Console(file=file, width=width, force_terminal=True, color_system=None), weights_table(rows))
    return file.getvalue()


def test_tables_of_a_model_fit_80_columns_and_bits_are_without_padding() -> None:
    model = BlockFFNForCausalLM(BlockFFNConfig(**SIZES))  # type: ignore[arg-type]
    rows = stored_weights(model, "int4", group_size=64)
    text = shown(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    line = next(line for line in text.splitlines() if "experts.up_proj" in line)
    assert line.split()[1:5] == ["4×16×128", "2", "int4", "4.25"]  # a scale of 16 bits for 64 weights
    assert "are padding" in text  # experts of 16 rows fill half a strip
    errors = {row.format: row.bits_per_weight for row in format_errors(model, group_size=64)}
    # Half of the weights, the down projections, have one group of 16 columns, with a scale of its own.
    assert errors == {"f32": 32, "bf16": 16, "int8": 8.625, "int4": 4.625}
    assert errors_table(format_errors(model, group_size=64)).row_count == 4


def test_layers_share_a_line_with_their_largest_error_and_shares_count_every_weight() -> None:
    rows = [
        StoredWeight("model.layers.0.experts", (4, 8, 32), "int4", 600, 0.1, padding_bytes=88),
        StoredWeight("model.layers.1.experts", (4, 8, 32), "int4", 600, 0.2, padding_bytes=88),
        StoredWeight("model.router.weight", (64, 32), "bf16", 4096, 0.0017),
    ]
    lines = [line.split() for line in shown(rows).splitlines()]
    assert ["experts", "4×8×32", "2", "int4", "4.00", "0.00", "20.00%"] in lines
    assert ["router", "64×32", "bf16", "16.00", "0.00", "0.17%"] in lines
    assert share_lines(rows) == ["bf16: 0.00 M weights, 50.0% of all", "int4: 0.00 M weights, 50.0% of all"]


def test_without_padding_nothing_is_said_of_it() -> None:
    assert "padding" not in shown([StoredWeight("a", (32, 32), "bf16", 2048, 0.0)])
