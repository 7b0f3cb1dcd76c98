"""Which implementation serves a call, and why: the only reader of ``DPPO_KERNELS_BACKEND``.

``auto`` picks; a backend named by argument or environment either serves the call or raises with the reason. It never falls
back silently.
"""

import importlib.util
import os

import torch

from dppo_kernels._checks import check_choice

BACKENDS = ("auto", "reference", "torch", "triton", "cuda")

# What each op is implemented in, best first: `auto` takes the first that is available.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "linear_logprobs": ("torch", "reference"),
    "token_logprobs": ("torch", "reference"),
    "topk_logprobs": ("torch", "reference"),
}

ENVIRONMENT_VARIABLE = "DPPO_KERNELS_BACKEND"


def status() -> dict[str, tuple[bool, str]]:
    """Backend name -> (available on this machine, reason). Looks without importing Triton or starting CUDA."""
    triton_found = importlib.util.find_spec("triton") is not None
    cuda_built = torch.backends.cuda.is_built()
    return {
        "reference": (True, "definition in plain torch, autograd through row chunks"),
        "torch": (True, f"tiled torch {torch.__version__}, {torch.get_num_threads()} CPU threads"),
        "triton": (
            False,
            "this version has no Triton kernels" + ("" if triton_found else ", and Triton is not installed"),
        ),
        "cuda": (
            False,
            "this version has no CUDA kernels" + ("" if cuda_built else ", and torch is a CPU build"),
        ),
    }


def resolve(op: str, backend: str | None) -> str:
    """The implementation that serves `op`: the argument, else the environment, else the best one available.

    Raises:
        ValueError: unknown backend, or one that cannot serve `op` (with the reason).
    """
    requested, source = _requested(backend)
    if requested == "auto":
        return IMPLEMENTATIONS[op][0]
    if requested not in IMPLEMENTATIONS[op]:
        raise ValueError(f"{source} cannot serve {op}: {status()[requested][1]}. It runs on {', '.join(IMPLEMENTATIONS[op])}")
    return requested


def explain(op: str, backend: str | None = None) -> str:
    """One sentence: which implementation serves `op` and why."""
    check_choice("op", op, IMPLEMENTATIONS)
    requested, source = _requested(backend)
    name = resolve(op, backend)
    why = "the best one implemented" if requested == "auto" else f"named by {source}"
    return f"{op} runs on {name!r} ({why}): {status()[name][1]}"


def _requested(backend: str | None) -> tuple[str, str]:
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
        return backend, f"backend={backend!r}"
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    check_choice(ENVIRONMENT_VARIABLE, name, BACKENDS)
    return name, f"{ENVIRONMENT_VARIABLE}={name!r}"
