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


def test_a_way_has_one_colour_in_both_parts_and_both_name_their_unit() -> None:
    whole, by_kind = decoding_rates(report(simulated=False, kinds=("qa", "rag"))).axes
    assert [bar.get_facecolor() for bar in by_kind.patches[:3]] == [bar.get_facecolor() for bar in whole.patches]
    assert all("tokens per second" in axes.get_xlabel() for axes in (whole, by_kind))


def test_thousands_of_tokens_have_no_decimals() -> None:
    fast = report(simulated=False)
    fast["results"][0]["rates"][-1]["tokens_per_second"] = 5302.83
    assert decoding_rates(fast).axes[0].texts[0].get_text() == "5,303  1.00×"
