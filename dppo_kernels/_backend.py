"""Which implementation serves a call, and why: the only reader of ``DPPO_KERNELS_BACKEND``.

``auto`` picks; a backend named by argument or environment either serves the call or raises with the reason. It never falls
back silently.
"""

import importlib.util
import os

import torch

from dppo_kernels import _ext
from dppo_kernels._checks import check_choice

BACKENDS = ("auto", "reference", "torch", "triton", "cpp", "cuda")

# What each op is implemented in, best first: `auto` takes the first that can serve the call.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "linear_logprobs": ("triton", "torch", "reference"),
    "token_logprobs": ("triton", "torch", "reference"),
    "topk_logprobs": ("cuda", "cpp", "torch", "reference"),
    "linear_policy_loss": ("triton", "torch", "reference"),
    "linear_preference_loss": ("triton", "torch", "reference"),
    "gae": ("triton", "cpp", "torch", "reference"),
    "value_loss": ("triton", "torch", "reference"),
    "linear_distill_loss": ("triton", "torch", "reference"),
    "distill_loss": ("triton", "torch", "reference"),
}

_REDUCED = (torch.float32, torch.bfloat16, torch.float16)
EXTENSION_DTYPES = {"topk_logprobs": _REDUCED, "gae": (*_REDUCED, torch.float64)}

ENVIRONMENT_VARIABLE = "DPPO_KERNELS_BACKEND"

# Looked up once: neither Triton is imported here nor CUDA started.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def status() -> dict[str, tuple[bool, str]]:
    """Backend name -> (available on this machine, reason)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = _triton_obstacle(device, torch.float32)
    how = "interpreted, for tests" if _INTERPRETED else "fused kernels on CUDA tensors"
    return {
        "reference": (True, "definition in plain torch, autograd through row chunks"),
        "torch": (True, f"tiled torch {torch.__version__}, {torch.get_num_threads()} CPU threads"),
        "triton": (obstacle is None, how if obstacle is None else obstacle),
        "cpp": _cpp_status(),
        "cuda": _cuda_status(),
    }


def _cpp_status() -> tuple[bool, str]:
    if not _ext.CPU.loaded:
        return False, _ext.CPU.reason
    stale = f", an older build without {', '.join(_ext.CPU.lacks)}" if _ext.CPU.lacks else ""
    return True, f"C++ on CPU tensors ({_ext.CPU.reason}{stale})"


def _cuda_status() -> tuple[bool, str]:
    if not _ext.CUDA.loaded:
        return False, _ext.CUDA.reason
    if not torch.cuda.is_available():
        return False, f"no CUDA device ({_ext.CUDA.reason} is loaded)"
    return True, f"CUDA C++ on CUDA tensors ({_ext.CUDA.reason})"


def resolve(op: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that serves `op` on tensors of this device and dtype: the argument's, the environment's or the best.

    Raises:
        ValueError: unknown backend, or one that cannot serve the call (with the reason).
    """
    requested, source = _requested(backend)
    if requested == "auto":
        return next(name for name in IMPLEMENTATIONS[op] if _obstacle(op, name, device, dtype, named=False) is None)
    obstacle = _obstacle(op, requested, device, dtype, named=True)
    if obstacle is not None:
        raise ValueError(f"{source} cannot serve {op}: {obstacle}. It is implemented in {', '.join(IMPLEMENTATIONS[op])}")
    return requested


def explain(op: str, backend: str | None = None, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> str:
    """One sentence: which implementation serves `op` and why. `device` defaults to CUDA where there is one."""
    check_choice("op", op, IMPLEMENTATIONS)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    requested, source = _requested(backend)
    name = resolve(op, backend, device, dtype)
    why = f"the best one for {device.type} tensors" if requested == "auto" else f"named by {source}"
    return f"{op} runs on {name!r} ({why}): {status()[name][1]}"


def _obstacle(op: str, name: str, device: torch.device, dtype: torch.dtype, *, named: bool) -> str | None:
    """Why this implementation cannot serve, or (not `named`) should not be picked."""
    if name not in IMPLEMENTATIONS[op]:
        return f"this version has no {name} implementation of it"
    if name == "triton":
        if not named and device.type == "cpu":
            return "the interpreter is for tests"
        return _triton_obstacle(device, dtype)
    if name in ("cpp", "cuda"):
        return _extension_obstacle(op, name, device, dtype)
    return None


def _extension_obstacle(op: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    extension, wanted = (_ext.CUDA, "cuda") if name == "cuda" else (_ext.CPU, "cpu")
    if device.type != wanted:
        return f"it serves {wanted} tensors, these are on {device.type}"
    if not extension.loaded:
        return extension.reason
    if op in extension.lacks:
        return f"{extension.reason} is of an older build without it: build it again (make ext, or install again)"
    if name == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "it is compiled for sm_80 and later"
    if dtype not in EXTENSION_DTYPES[op]:
        *others, last = (str(x).removeprefix("torch.") for x in EXTENSION_DTYPES[op])
        return f"it serves {', '.join(others)} and {last}, these tensors are {str(dtype).removeprefix('torch.')}"
    return None


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not _INTERPRETED:
        return f"its kernels need a CUDA device, these tensors are on {device.type} (TRITON_INTERPRET=1 interprets them)"
    if dtype == torch.float64:
        return "its statistics are float32, these tensors are float64"
    return None


def _requested(backend: str | None) -> tuple[str, str]:
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
        return backend, f"backend={backend!r}"
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    check_choice(ENVIRONMENT_VARIABLE, name, BACKENDS)
    return name, f"{ENVIRONMENT_VARIABLE}={name!r}"
