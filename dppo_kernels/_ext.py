"""The compiled extensions of `csrc/`: found and loaded once, when this is imported. Loading them touches no CUDA device."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

_FOLDER = Path(__file__).resolve().parent


# What this version calls, by extension. A file of an earlier build lacks what came since.
OPS = {"_C": ("topk_logprobs", "gae", "whiten"), "_C_cuda": ("topk_logprobs",)}


class Extension(NamedTuple):
    """Whether its ops can be called, and in words what was found."""

    loaded: bool
    reason: str
    lacks: tuple[str, ...] = ()  # ops of this version that a loaded extension does not have


def _load(name: str) -> Extension:
    if _is_loaded(name):
        return Extension(True, "loaded before", _lacks(name))  # a second copy would end the process
    path = next(_FOLDER.glob(f"{name}.*so"), None)
    if path is None:
        return Extension(False, f"not built: {_why_not_built(name)}")
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return Extension(False, f"{path.name} does not load: {str(error).splitlines()[0]}")
    return Extension(True, path.name, _lacks(name))


def _lacks(name: str) -> tuple[str, ...]:
    return tuple(op for op in OPS[name] if not hasattr(getattr(torch.ops, f"dppo_kernels{name}"), op))


def _is_loaded(name: str) -> bool:
    return len(_lacks(name)) < len(OPS[name])


def _why_not_built(name: str) -> str:
    report = _FOLDER / "_build.json"
    if not report.is_file():
        return "no build was tried (pip install --no-build-isolation, without DPPO_KERNELS_SKIP_EXT)"
    try:
        reason = json.loads(report.read_text()).get(name, "unknown to the build")
    except (OSError, ValueError) as error:
        return f"{report.name} cannot be read ({error})"
    return "its file is gone since" if reason == "built" else reason


CPU = _load("_C")
CUDA = _load("_C_cuda")
