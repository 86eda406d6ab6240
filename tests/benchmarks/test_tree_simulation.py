"""In the simulation a tree shaped by cost is never far below the best fixed size, and well above it somewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from tree_simulation import POOL, REGIMES, compare, milliseconds, outcome, simulate_rounds  # noqa: E402


@pytest.mark.slow
def test_never_three_percent_below_the_best_fixed_size_and_ten_above_it_somewhere() -> None:
    gains = {regime.name: compare(regime, rounds=250, seed=1)["gain"] for regime in REGIMES}
    assert min(gains.values()) > 0.97, gains
    assert max(gains.values()) > 1.10, gains


def test_a_changing_text_gains_more_than_a_tenth() -> None:
    regime = next(regime for regime in REGIMES if regime.name == "two cores, changing text")
    assert compare(regime, rounds=60)["gain"] > 1.1


def test_more_nodes_bring_more_tokens_and_cost_more_time() -> None:
    for round_ in simulate_rounds(REGIMES[0], 5):
        sizes = range(0, POOL + 1, 9)
        tokens = [outcome(round_, list(range(size)))[0] for size in sizes]
        spent = [milliseconds(REGIMES[0], round_, list(range(size)))[0] for size in sizes]
        assert tokens == sorted(tokens)
        assert spent == sorted(spent)
        path = outcome(round_, list(range(POOL)))[1]
        assert path == (round_.tree.path(path[-1]) if path else [])


def test_the_command_writes_its_table_as_data(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tree_simulation.py"), "--rounds", "3", "--json",
               str(tmp_path / "out.json")]  # fmt: skip
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["regime"]["name"] for row in rows] == [regime.name for regime in REGIMES]
    assert all(regime.name in printed for regime in REGIMES)
