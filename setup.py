"""Builds the CPU kernels (`native/`) while the package is installed.

Everything else about the package is in pyproject.toml. The kernels are one shared object with a plain C interface: it
knows neither Python's nor torch's ABI, so one `py3-none-<platform>` wheel serves every Python. Without a compiler the
installation still succeeds, and the package says at run time what is slower.

Environment: `CXX` names the compiler; `BLOCKFFN_NATIVE=0` skips the build, `=required` makes a failed build an error.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path(__file__).parent / "native"
NAME = "blockffn.ops._native"
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
                "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-maybe-uninitialized",
                "-Wno-uninitialized"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
# A file whose flags the compiler does not know is compiled without them, and then offers no kernels.
ISA_FLAGS = {
    "x86_64": {
        "kernels_avx2.cpp": AVX2,
        "kernels_avx512.cpp": AVX512,
        "kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
        "kernels_amx.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    },
    "aarch64": {"kernels_neon.cpp": ["-march=armv8.2-a+dotprod"]},
}
ISA_FLAGS["arm64"] = ISA_FLAGS["aarch64"]


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: `CXX`, the system's, or the one inside the `ziglang` package."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    return None


def run(command: list[str]) -> None:
    """Run a compiler. Raises `RuntimeError` with what it said."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stderr or result.stdout}")


def compile_library(compiler: list[str], objects: Path, library: Path) -> None:
    """Compile every file of `native/` and link them into `library`."""
    target = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=False).stdout
    isa_flags = ISA_FLAGS.get(target.split("-", 1)[0].strip(), {})
    objects.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)

    def compile_file(source: Path) -> str:
        command = [*compiler, *COMMON_FLAGS, "-c", str(source), "-o", str(objects / f"{source.stem}.o")]
        try:
            run(command + isa_flags.get(source.name, []))
        except RuntimeError:
            if source.name not in isa_flags:
                raise
            run(command)
        return command[-1]

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        files = list(pool.map(compile_file, sorted(NATIVE.glob("*.cpp"))))
    # The kernels use no C++ library. zig would otherwise build its own first, which takes minutes.
    without_library = ["-nostdlib++"] if "ziglang" in compiler else []
    run([*compiler, "-shared", *without_library, *files, "-o", str(library)])


class BuildNative(build_ext):
    """Builds the shared object where setuptools expects an extension module, under a name without a Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        choice = os.environ.get("BLOCKFFN_NATIVE", "1")
        if choice == "0":
            return
        compiler = find_compiler()
        try:
            if compiler is None:
                raise RuntimeError("no C++ compiler found (tried c++, g++, clang++ and the ziglang package)")
            compile_library(compiler, Path(self.build_temp) / "native", Path(self.get_ext_fullpath(ext.name)))
        except RuntimeError as error:
            if choice == "required":
                raise
            print(
                f"\nblockffn: the CPU kernels were not built: {error}\n"
                "The package works without them; decoding on a CPU is several times slower.\n"
                "To have them, install a C++ compiler (or `pip install ziglang`) and install blockffn again.\n",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        """For editable installs: skipped when nothing was built."""
        if all((Path(self.build_lib) / self.get_ext_filename(ext.name)).exists() for ext in self.extensions):
            super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension(NAME, sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
