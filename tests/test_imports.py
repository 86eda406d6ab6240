"""Imports go one way, and light modules stay light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "blockffn"

# What each part of the package may import of the rest of it.
BASE = {"configuration", "presets", "routing", "errors", "settings", "wording", "_registration"}
ALLOWED = {
    "ops": BASE,
    "objectives": BASE,
    "metrics": BASE,
    "reporting": set(),
    "data": BASE | {"objectives", "metrics"},
    "models": BASE | {"ops", "objectives", "metrics"},
    "checkpoints": BASE | {"ops", "metrics", "models"},
    "training": BASE | {"ops", "objectives", "metrics", "data", "models", "checkpoints", "evaluation"},
    "sparsify": BASE | {"ops", "metrics", "data", "models", "checkpoints"},
    "inference": BASE | {"ops", "objectives", "metrics", "data", "models", "checkpoints"},
    "evaluation": BASE | {"ops", "objectives", "metrics", "data", "models", "checkpoints", "training", "inference"},
    "experiments": BASE | {"reporting", "data", "training"},
}


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("blockffn.")}
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_it_may(part: str) -> None:
    for file in (PACKAGE / part).rglob("*.py"):
        surplus = imports_of(file) - ALLOWED[part] - {part}
        assert not surplus, f"{file.relative_to(PACKAGE)} imports {sorted(surplus)}"


@pytest.mark.parametrize(("module", "absent"), [("blockffn.reporting", "torch"), ("blockffn.cli", "torch"),
                                                ("blockffn.experiments.page", "torch"),
                                                ("blockffn.cli", "transformers"), ("blockffn", "numpy")])  # fmt: skip
def test_a_light_module_stays_light(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_answers_at_once() -> None:
    def processor_seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "blockffn", "--help"], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # A third of a second, twice that on a busy machine, whose waiting does not count. Importing torch takes several.
    assert min(processor_seconds() for _ in range(3)) < 0.8
