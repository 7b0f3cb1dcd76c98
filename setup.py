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

# What the sources use of torch's stable ABI: one build serves this version and later ones.
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")
CPU_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
ARCHITECTURES = (80, 90, 100)
NOT_BUILT = "torch was not found when this was installed: install torch, then this with --no-build-isolation"


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


class BuildExtensions(build_ext):
    """Builds each extension by itself, so that one that fails does not lose the other, and writes down how it went."""

    def run(self) -> None:
        self.report: dict[str, str] = {}
        super().run()
        folder = Path("dppo_kernels") if self.inplace else Path(self.build_lib, "dppo_kernels")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def build_extensions(self) -> None:
        for extension in list(self.extensions):
            obstacle = self.prepare(extension)
            if obstacle is None:
                try:
                    self.build_extension(extension)
                except Exception as error:
                    if enabled("DPPO_KERNELS_REQUIRE_EXT"):
                        raise
                    obstacle = f"its build failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            elif extension.name.endswith("._C") and enabled("DPPO_KERNELS_REQUIRE_EXT"):
                raise RuntimeError(f"{extension.name} cannot be built: {obstacle}")
            if obstacle is not None:
                print(f"{extension.name} was left out: {obstacle}")
                self.extensions.remove(extension)
            self.report[extension.name.rpartition(".")[2]] = obstacle or "built"

    def prepare(self, extension: Extension) -> str | None:
        """Add torch's and CUDA's paths; returns why it cannot be built, if so."""
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError:
            return NOT_BUILT
        extension.include_dirs += include_paths()
        extension.library_dirs += library_paths()
        if not extension.name.endswith("_cuda"):
            return None
        if torch.version.cuda is None and not enabled("FORCE_CUDA"):
            return "torch is a CPU build"
        toolkit = find_toolkit()
        if toolkit is None:
            return "no CUDA toolkit (set CUDA_HOME)"
        extension.include_dirs.append(str(toolkit / "include"))
        folders = [toolkit / "lib64", toolkit / "lib", toolkit / "targets" / "x86_64-linux" / "lib"]
        runtime = next((f for f in folders if (f / "libcudart_static.a").is_file()), None)
        if runtime is None:
            return f"{toolkit} lacks libcudart_static.a"
        try:
            objects = self.compile_cuda(extension, toolkit / "bin" / "nvcc")
        except subprocess.CalledProcessError as error:
            if enabled("DPPO_KERNELS_REQUIRE_EXT"):
                raise
            return f"nvcc failed with exit status {error.returncode}"
        extension.extra_objects += [*objects, str(runtime / "libcudart_static.a")]
        extension.libraries += ["dl", "rt", "pthread"]
        return None

    def compile_cuda(self, extension: Extension, nvcc: Path) -> list[str]:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        targets = [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in targets]
        codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")  # for devices that come after
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
        depends=sorted(str(path) for path in Path("csrc").rglob("*.*")),
        extra_compile_args=CPU_FLAGS,
        language="c++",
        optional=True,
        py_limited_api=True,
    )


EXTENSIONS = [
    extension("_C", "csrc/ops.cpp", *sorted(str(path) for path in Path("csrc", "cpu").glob("*.cpp"))),
    extension("_C_cuda", "csrc/cuda/ops.cpp"),
]

if __name__ == "__main__":
    build = not enabled("DPPO_KERNELS_SKIP_EXT")
    setup(
        ext_modules=EXTENSIONS if build else [],
        cmdclass={"build_ext": BuildExtensions},
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if build else {},
    )
