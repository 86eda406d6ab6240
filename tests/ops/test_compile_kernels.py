"""The Triton kernels compile for GPUs, one with little shared memory, whether this machine has one or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "tokens", "name"), [("89", "1 8 64", "RTX 4090"), ("90", "1 8", "H100")])
def test_kernels_compile_and_fit(capability: str, tokens: str, name: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.compile_kernels", capability, "--tokens", *tokens.split()]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    count, rest = done.stdout.split(maxsplit=1)
    assert rest == f"kernels for {name}\n"
    assert int(count) > 80
