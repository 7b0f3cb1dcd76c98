"""Public `gae` and its custom op ``dppo_kernels::gae``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._numerics import stat_dtype
from dppo_kernels.gae.native import gae_cpp
from dppo_kernels.gae.reference import gae_ref
from dppo_kernels.gae.torch_impl import gae_fwd
from dppo_kernels.moments import whiten as whiten_masked

Lambda = float | Tensor


class Gae(NamedTuple):
    """Detached; 0 where nothing counts."""

    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T]


def gae(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,  # scalar or [B]
    lam_value: float | Tensor | None = None,  # scalar or [B]
    bootstrap: Tensor | None = None,  # [B]
    whiten: bool = False,
    backend: str | None = None,
    check_values: bool = False,
) -> Gae:
    """Generalised advantage estimates, and the returns a value model is trained towards.

    ``delta_t = r_t + gamma V_next - V_t``, ``A_t = delta_t + gamma lam A_next``, ``R_t = A_t + V_t``, where "next" is the next
    position that counts: masked ones are skipped, on any side and in between, and are 0 in both results.

    Args:
        rewards: [B, T] floating.
        values: [B, T] floating, of the states that the rewards follow.
        mask: bool [B, T], True = counts. Whatever stands behind it, NaN included, changes nothing.
        gamma: discount per counted step, in [0, 1].
        lam: lambda of the advantages in [0, 1], or a tensor [B] with one per row, such as `length_adaptive_lambda`.
        lam_value: lambda of the returns, if it is another one: ``R_t = A_t(lam_value) + V_t``. 1 is the Monte-Carlo return.
        bootstrap: [B] value of what follows the last counted position of each row; None is 0 (the episode ended there).
        whiten: whiten the advantages over the call (see `whiten`); returns are made of those before.
        backend: "auto" (default: "triton" on CUDA, "cpp" on CPU where that extension is built, else "torch"), "triton", "cpp",
            "torch" or "reference"; also set by ``DPPO_KERNELS_BACKEND``. float64 on CUDA runs on "torch".
        check_values: check the range of lambdas that are tensors on CUDA too (a host sync); on CPU they are always checked.

    Returns:
        `Gae`, float32 (float64 if one of rewards and values is).

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, device, gamma, lambda or backend.

    Source: Schulman et al. (1506.02438); lambda of its own for the returns, VC-PPO (2503.01491); lambda per row, VAPO
    (2504.05118).
    """
    _check_arguments(rewards, values, mask, bootstrap)
    _checks.check_fraction("gamma", gamma)
    for name, value in {"lam": lam, "lam_value": lam_value}.items():
        _check_lambda(name, value, mask)
    name = _backend.resolve("gae", backend, values.device, torch.promote_types(rewards.dtype, values.dtype))
    dtype = stat_dtype(torch.promote_types(rewards.dtype, values.dtype))
    scalars = [x if x is None or isinstance(x, Tensor) else float(x) for x in (lam, lam_value)]
    rows = [x.detach().to(dtype) if isinstance(x, Tensor) else None for x in scalars]
    inputs = (rewards.detach(), values.detach(), mask, None if bootstrap is None else bootstrap.detach(), *rows)
    numbers = [None if isinstance(x, Tensor) else x for x in scalars]
    run: Callable[..., tuple[Tensor, Tensor]] = _gae if name == "reference" else torch.ops.dppo_kernels.gae
    return Gae(*run(*inputs, float(gamma), *numbers, bool(whiten), bool(check_values), name))


def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    lam_rows: Tensor | None,
    lam_value_rows: Tensor | None,
    gamma: float,
    lam: float | None,
    lam_value: float | None,
    whiten: bool,
    check_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if values.device.type == "cpu" or check_values:
        for name, rows in {"lam": lam_rows, "lam_value": lam_value_rows}.items():
            _check_range(name, rows)
    dtype = stat_dtype(torch.promote_types(rewards.dtype, values.dtype))
    lambdas = (lam if lam_rows is None else lam_rows, lam_value if lam_value_rows is None else lam_value_rows)
    if backend in ("cpp", "triton"):
        if backend == "triton":  # imported here: the package works without Triton
            from dppo_kernels.gae.kernels import gae_triton
        fused = gae_cpp if backend == "cpp" else gae_triton
        return fused(rewards, values, mask, bootstrap, gamma, *lambdas, dtype, whiten)  # type: ignore[arg-type]
    run = {"torch": gae_fwd, "reference": gae_ref}[backend]
    advantages, returns = run(rewards, values, mask, bootstrap, gamma, *lambdas, dtype)  # type: ignore[arg-type]
    return whiten_masked(advantages, mask) if whiten else advantages, returns


_op = torch.library.custom_op("dppo_kernels::gae", _gae, mutates_args=())


@_op.register_fake
def _(rewards: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = stat_dtype(torch.promote_types(rewards.dtype, values.dtype))
    advantages, returns = (values.new_empty(values.shape, dtype=dtype) for _ in range(2))
    return advantages, returns


def _check_arguments(rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None) -> None:
    _checks.check_floating("rewards", rewards)
    _checks.check_floating("values", values)
    _checks.check_mask("mask", mask)
    if rewards.dim() != 2:
        raise ValueError(f"`rewards` must be [B, T], got {list(rewards.shape)}")
    others = {"values": values, "mask": mask}
    for name, value in others.items():
        _checks.check_shape(name, value, rewards.shape, "that of `rewards`")
    if bootstrap is not None:
        _checks.check_floating("bootstrap", bootstrap)
        _checks.check_shape("bootstrap", bootstrap, rewards.shape[:1], "[B]")
        others["bootstrap"] = bootstrap
    for name, value in others.items():
        _checks.check_device(name, value, "rewards", rewards)


def _check_lambda(name: str, value: Lambda | None, mask: Tensor) -> None:
    if isinstance(value, Tensor):
        _checks.check_floating(name, value)
        _checks.check_shape(name, value, mask.shape[:1], "[B]")
        _checks.check_device(name, value, "rewards", mask)
    elif value is not None or name == "lam":
        _checks.check_fraction(name, value)  # type: ignore[arg-type]


def _check_range(name: str, rows: Tensor | None) -> None:
    if rows is not None and bool((outside := ~((rows >= 0) & (rows <= 1))).any()):
        row = int(outside.nonzero()[0])
        raise ValueError(f"`{name}` must be in [0, 1]; got {rows[row].item()} in row {row}")
