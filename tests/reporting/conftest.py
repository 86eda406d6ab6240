from __future__ import annotations

from pathlib import Path

import pytest

from blockffn.reporting import write_report
from tests.reporting.fake_runs import write_fake_run

# Small enough to draw in a fraction of a second, with what is hard to show: markup, a dollar sign, tabs, blank lines.
TEXT = "    return $5 & <b>\n\n\tx  = 1\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "run", steps=60, layers=2, experts=8, continuation=TEXT)


@pytest.fixture
def dense_run(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "dense", dense=True, steps=60, continuation=TEXT, seed=2)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report, for tests that only look at it."""
    folder = tmp_path_factory.mktemp("finished")
    run = write_fake_run(folder / "run", steps=200, layers=2, experts=8, continuation=TEXT)
    write_report(run, twin=write_fake_run(folder / "dense", dense=True, steps=200, continuation=TEXT, seed=2))
    return run
