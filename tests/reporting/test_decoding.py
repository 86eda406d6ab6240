"""The figure of bench decode says what was measured, and whether acceptance was simulated."""

from __future__ import annotations

from typing import Any

from blockffn.reporting.decoding import decoding_rates


def report(*, simulated: bool) -> dict[str, Any]:
    def way(name: str, rate: float, ratio: float | None, length: float | None) -> dict[str, Any]:
        return {"way": name, "rates": [
            {"task": task, "tokens_per_second": rate * share, "ratio": ratio, "acceptance_length": length}
            for task, share in (("qa", 0.9), ("all", 1.0))
        ]}  # fmt: skip

    return {
        "results": [way("dense, plain", 10.0, 1.0, 1.0), way("sparse, fixed tree 7", 30.0, 3.0, 2.5),
                    way("llama.cpp", 8.0, None, None)],
        "machine": {"device": "a machine"},
        "models": {"sparse": {"simulated_acceptance": simulated}},
    }  # fmt: skip


def test_every_way_has_a_bar_with_its_rate_ratio_and_tokens_a_step() -> None:
    axes = decoding_rates(report(simulated=True)).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [10, 30, 8]
    assert [text.get_text() for text in axes.texts] == ["10.0  1.00×", "30.0  3.00×  2.5 a step", "8.0"]
    assert "simulated" in axes.get_title(loc="left")


def test_without_simulation_nothing_is_called_simulated() -> None:
    assert "simulated" not in decoding_rates(report(simulated=False)).axes[0].get_title(loc="left")
