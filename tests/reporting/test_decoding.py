"""The figure of bench decode says what was measured, and whether acceptance was simulated."""

from __future__ import annotations

from typing import Any

from blockffn.reporting.decoding import decoding_rates


def report(*, simulated: bool, kinds: tuple[str, ...] = ("qa",)) -> dict[str, Any]:
    def way(name: str, rate: float, ratio: float | None, length: float | None) -> dict[str, Any]:
        return {"way": name, "rates": [
            {"task": task, "tokens_per_second": rate * share, "ratio": ratio, "acceptance_length": length}
            for task, share in (*((kind, 0.9) for kind in kinds), ("all", 1.0))
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


def test_several_kinds_have_bars_of_their_own_for_every_way() -> None:
    whole, by_kind = decoding_rates(report(simulated=False, kinds=("qa", "math_reasoning"))).axes
    assert len(whole.patches) == 3
    assert [bar.get_width() for bar in by_kind.patches] == [9, 27, 7.2] * 2
    assert [label.get_text() for label in by_kind.get_yticklabels()] == ["qa", "math reasoning"]
    assert [text.get_text() for text in by_kind.texts][1] == " 27.0  2.5 a step"


def test_without_simulation_nothing_is_called_simulated() -> None:
    assert "simulated" not in decoding_rates(report(simulated=False)).axes[0].get_title(loc="left")
