"""In the simulation a tree shaped by cost is never far below the best fixed size, and well above it somewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from tree_simulation import FIXED_SIZES, POOL, REGIMES, compare, fixed, milliseconds, outcome, simulate_rounds  # noqa: E402


@pytest.mark.slow
def test_never_three_percent_below_the_best_fixed_size_and_ten_above_it_somewhere() -> None:
    gains = {regime.name: compare(regime, rounds=200)["gain"] for regime in REGIMES}
    assert min(gains.values()) > 0.97, gains
    assert max(gains.values()) > 1.10, gains


def test_more_nodes_bring_more_tokens_and_cost_more_time() -> None:
    for round_ in simulate_rounds(REGIMES[0], 5):
        sizes = range(0, POOL + 1, 9)
        tokens = [outcome(round_, list(range(size)))[0] for size in sizes]
        spent = [milliseconds(REGIMES[0], round_, list(range(size)))[0] for size in sizes]
        assert tokens == sorted(tokens)
        assert spent == sorted(spent)
        path = outcome(round_, list(range(POOL)))[1]
        assert path == (round_.tree.path(path[-1]) if path else [])


def test_a_fixed_size_is_judged_as_the_same_nodes_chosen_one_by_one() -> None:
    rounds = simulate_rounds(REGIMES[2], 105)
    for size in FIXED_SIZES:
        nodes = list(range(size))
        tokens = sum(outcome(round_, nodes)[0] for round_ in rounds[100:])
        spent = sum(milliseconds(REGIMES[2], round_, nodes)[0] for round_ in rounds[100:])
        assert fixed(REGIMES[2], rounds)[size]["tokens_per_second"] == pytest.approx(1000 * tokens / spent)


@pytest.mark.slow
def test_the_command_writes_its_table_as_data(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tree_simulation.py"), "--rounds", "3", "--json",
               str(tmp_path / "out.json")]  # fmt: skip
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["regime"]["name"] for row in rows] == [regime.name for regime in REGIMES]
    assert all(regime.name in printed for regime in REGIMES)
