from __future__ import annotations

from pathlib import Path

import pytest
from fake_runs import write_fake_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "run", steps=400)


@pytest.fixture
def dense_run(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "dense", dense=True, steps=400, seed=2)
