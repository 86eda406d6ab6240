"""The native library: every instruction set gives right results, and where there is no library the package says so."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from blockffn.ops import native
from blockffn.ops.sparse_ffn import sparse_ffn

from .layers import Layer

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="the native kernels are not built")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::UserWarning:blockffn", "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@needs_native
@pytest.mark.parametrize("isa", ["portable", "avx512_bf16", "avx512", "avx2", "neon"])
def test_every_instruction_set_passes_the_same_tests(isa: str) -> None:
    if isa == native.isa():
        pytest.skip("these kernels are the ones that all other tests run")
    if python("from blockffn.ops import native; native.isa()", BLOCKFFN_CPU_ISA=isa).returncode:
        pytest.skip(f"this processor has no {isa}")
    # All comparisons with the reference.
    files = ["tests/ops/test_sparse_ffn_cpu.py", "tests/ops/test_linear.py", "tests/inference/test_native_target.py"]
    chosen = "agree or alike or equal"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    environment = os.environ | {"BLOCKFFN_CPU_ISA": isa}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]


@needs_native
def test_unknown_instruction_set_is_an_error_that_names_the_best() -> None:
    result = python("from blockffn.ops import native; native.isa()", BLOCKFFN_CPU_ISA="mmx")
    assert result.returncode != 0
    assert "'mmx'; the best one here is" in result.stderr


@needs_native
def test_threads_are_those_of_torch() -> None:
    """A second pool would spin on the cores of the first."""
    if platform.system() != "Linux":
        pytest.skip("reads /proc")
    code = """
import torch
from blockffn.ops import native
torch.set_num_threads(3)
torch.randn(512, 512) @ torch.randn(512, 512); torch.randn(1 << 20).sin()
from pathlib import Path
before = len(list(Path("/proc/self/task").iterdir()))
native.read_bandwidth(torch.zeros(1 << 24, dtype=torch.uint8))
print(len(list(Path("/proc/self/task").iterdir())) - before)
"""
    result = python(code)
    assert result.stdout.strip() == "0", result.stderr


def test_missing_library_is_reported_once_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    native.forget()
    layer = Layer.random(2, 3, 32, 64)
    arguments = (layer.x_TD, layer.up_proj_EFD, layer.down_proj_EFD, layer.weights_TE)
    try:
        with pytest.warns(UserWarning, match="the CPU kernels are not built; install a C\\+\\+ compiler"):
            y = sparse_ffn(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparse_ffn(*arguments)
        torch.testing.assert_close(y, sparse_ffn(*arguments, backend="reference"))
        with pytest.raises(ValueError, match="install a C\\+\\+ compiler"):
            sparse_ffn(*arguments, backend="cpu")
    finally:
        monkeypatch.undo()
        native.forget()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None or shutil.which("c++") is None, reason="needs make and a compiler")
@pytest.mark.parametrize("target", ["sanitize", "neon"])
def test_kernels_pass_their_own_checks(target: str, tmp_path: Path) -> None:
    """Under the address and undefined-behaviour sanitizers, and cross-compiled for ARM."""
    if target == "neon" and not (shutil.which("qemu-aarch64") and shutil.which("aarch64-linux-gnu-g++")):
        pytest.skip("needs the Debian packages qemu-user and g++-aarch64-linux-gnu")
    command = ["make", "-C", str(ROOT / "native"), target, f"OUT={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert "cases right" in result.stdout
