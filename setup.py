"""Builds the compiled extensions; everything else is in pyproject.toml.

An install never fails for want of torch, a compiler or a CUDA toolkit: what could not be built is left out, and the reason is
kept in `dppo_kernels/_build.json` for ``dppo doctor``. torch must be installed before (``--no-build-isolation``).

    DPPO_KERNELS_SKIP_EXT=1     build nothing
    DPPO_KERNELS_REQUIRE_EXT=1  a build that fails is an error
    FORCE_CUDA=1                build the CUDA extension although torch is a CPU build
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# What the sources use of torch's stable ABI: one build serves this version and later ones.
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")
CPU_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
ARCHITECTURES = (80, 90, 100)
NO_TORCH = (
    "torch was not found when this was installed: install torch, then this with "
    "--no-build-isolation --no-cache-dir --force-reinstall"
)


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder. A compiler on the PATH may be a wrapper script, so its headers are looked for too."""
    nvcc = shutil.which("nvcc")
    found = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc:
        found.append(str(Path(nvcc).resolve().parent.parent))
        text = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        found += re.findall(r"^#\$ TOP=(.+)$", text.stderr, re.MULTILINE)  # what a wrapper leads to
    found.append("/usr/local/cuda")
    folders = (Path(folder).resolve() for folder in found if folder)
    return next((f for f in folders if (f / "include" / "cuda_runtime.h").is_file() and (f / "bin" / "nvcc").is_file()), None)


def missing_torch() -> str | None:
    """Why torch cannot be built against, if so: a broken installation raises more than ImportError."""
    try:
        import torch
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return NO_TORCH
    except Exception as error:
        return f"{NO_TORCH} (importing it failed: {first_line(error)})"
    return None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def write_report(folder: Path, report: dict[str, str]) -> None:
    """Whole or not at all: it is read at import."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "_build.json.new"
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    unfinished.replace(folder / "_build.json")


class BuildPython(build_py):
    """Without torch there are no extensions to build, and so nobody else to say why."""

    def run(self) -> None:
        super().run()
        if OBSTACLE is not None:
            folder = Path("dppo_kernels") if self.editable_mode else Path(self.build_lib, "dppo_kernels")
            write_report(folder, dict.fromkeys(("_C", "_C_cuda"), OBSTACLE))


class BuildExtensions(build_ext):
    """Builds each extension by itself, so that one that fails does not lose the other, and writes down how it went."""

    def run(self) -> None:
        self.report: dict[str, str] = {}
        super().run()
        folder = Path("dppo_kernels") if self.inplace else Path(self.build_lib, "dppo_kernels")
        for name, outcome in self.report.items():
            for stale in folder.glob(f"{name}.*so") if outcome != "built" else ():
                stale.unlink()  # of an earlier build, and would be taken for this one's
        write_report(folder, self.report)

    def build_extensions(self) -> None:
        built = []
        for extension in self.extensions:
            required = enabled("DPPO_KERNELS_REQUIRE_EXT")
            try:
                obstacle = self.prepare(extension)
                if obstacle is None:
                    self.build_extension(extension)
                    built.append(extension)
            except Exception as error:
                if required:
                    raise
                obstacle = f"its build failed: {first_line(error)}"
            if obstacle is not None:
                print(f"{extension.name} was left out: {obstacle}")
            self.report[extension.name.rpartition(".")[2]] = obstacle or "built"
        self.extensions = built  # a new list: the old one is the distribution's, by which a wheel gets its tag

    def prepare(self, extension: Extension) -> str | None:
        """Add torch's and CUDA's paths; returns why it is not to be built, if so."""
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        extension.include_dirs += include_paths()
        extension.library_dirs += library_paths()
        if not extension.name.endswith("_cuda"):
            return None
        if torch.version.cuda is None and not enabled("FORCE_CUDA"):
            return "torch is built for ROCm" if torch.version.hip else "torch is a CPU build"
        toolkit = find_toolkit()
        if toolkit is None:
            return "no CUDA toolkit (set CUDA_HOME)"
        extension.include_dirs.append(str(toolkit / "include"))
        folders = [toolkit / "lib64", toolkit / "lib", *sorted(toolkit.glob("targets/*/lib"))]
        runtime = next((f for f in folders if (f / "libcudart_static.a").is_file()), None)
        if runtime is None:
            return f"{toolkit} lacks libcudart_static.a"
        extension.extra_objects += [*self.compile_cuda(toolkit / "bin" / "nvcc"), str(runtime / "libcudart_static.a")]
        extension.libraries += ["dl", "rt", "pthread"]
        return None

    def compile_cuda(self, nvcc: Path) -> list[str]:
        """Objects for every architecture that this nvcc knows, and code for devices that come after."""
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        targets = [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in targets]
        codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
        objects = []
        for source in sorted(Path("csrc", "cuda").glob("*.cu")):
            target = Path(self.build_temp, source.with_suffix(".cu.o").name)
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [str(nvcc), "-std=c++17", "-O3", "-Xcompiler", "-fPIC", *codes, "-c", str(source), "-o", str(target)]
            print(" ".join(command))
            subprocess.run(command, check=True)
            objects.append(str(target))
        return objects


def extension(name: str, *sources: str) -> Extension:
    return Extension(
        f"dppo_kernels.{name}",
        [*sources],
        define_macros=[STABLE_ABI],
        include_dirs=["csrc"],
        libraries=["torch", "torch_cpu", "c10"],
        depends=["setup.py", *sorted(str(path) for path in Path("csrc").rglob("*.*"))],
        extra_compile_args=CPU_FLAGS,
        language="c++",
        optional=True,
        py_limited_api=True,
    )


EXTENSIONS = [
    extension("_C", "csrc/ops.cpp", *sorted(str(path) for path in Path("csrc", "cpu").glob("*.cpp"))),
    extension("_C_cuda", "csrc/cuda/ops.cpp"),
]

SKIP = enabled("DPPO_KERNELS_SKIP_EXT")
OBSTACLE = None if SKIP else missing_torch()

if __name__ == "__main__":
    if OBSTACLE is not None and enabled("DPPO_KERNELS_REQUIRE_EXT"):
        raise RuntimeError(f"the extensions cannot be built: {OBSTACLE}")
    build = not SKIP and OBSTACLE is None
    setup(
        ext_modules=EXTENSIONS if build else [],
        cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if build else {},
    )
