"""Every backend of `gae` against float64, the custom op, whitening, and every error."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from dppo_kernels import _backend, gae, whiten
from tests.gae.cases import GaeCase, every_backend, gae_cases, op_backends
from tests.numerics import assert_as_exact_as_torch

B, T = 5, 33


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(B, T, generator=g).to(dtype) for _ in range(2))
    return rewards, values, torch.rand(B, T, generator=g) < 0.7


@every_backend
@given(gae_cases())
def test_as_exact_as_a_loop_in_torch(backend: str, case: GaeCase) -> None:
    out, in_torch = (gae(*case.inputs(), **case.options(), backend=name) for name in (backend, "reference"))
    exact = gae(*case.inputs(torch.float64), **case.options(torch.float64), backend="reference")
    for name in ("advantages", "returns"):
        assert_as_exact_as_torch(name, *(getattr(x, name) for x in (out, in_torch, exact)))


@every_backend
@given(gae_cases())
def test_float64_in_float64_out(backend: str, case: GaeCase) -> None:
    inputs, options = case.inputs(torch.float64), case.options(torch.float64)
    out, expected = (gae(*inputs, **options, backend=name) for name in (backend, "reference"))
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@every_backend
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_16_bit_inputs_have_float32_results(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rewards, values, mask = batch()
    rewards, values = (x.to(dtype) for x, dtype in zip((rewards, values), dtypes, strict=True))
    out = gae(rewards, values, mask, backend=backend)
    exact = gae(rewards.double(), values.double(), mask, backend="reference")
    for a, b in zip(out, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@every_backend
@given(gae_cases())
def test_whitened_advantages(backend: str, case: GaeCase) -> None:
    inputs, options = case.inputs(), case.options() | {"backend": backend}
    plain, white = gae(*inputs, **options), gae(*inputs, **options, whiten=True)
    assert torch.equal(white.returns, plain.returns)
    mask = inputs[2]
    torch.testing.assert_close(white.advantages, whiten(plain.advantages, mask), rtol=1e-5, atol=1e-5)
    exact = gae(*case.inputs(torch.float64), **case.options(torch.float64), whiten=True, backend="reference")
    torch.testing.assert_close(white.advantages.double(), exact.advantages, rtol=1e-4, atol=1e-4)
    assert not white.advantages[~mask].any()


@every_backend
def test_whitening_numbers_far_from_0(backend: str) -> None:
    """Advantages around 1e4 with a deviation of 1: float32 sums of squares would lose the variance."""
    g = torch.Generator().manual_seed(0)
    rewards = 1e4 + torch.randn(64, 300, generator=g)
    mask = torch.rand(64, 300, generator=g) < 0.8
    out = gae(rewards, torch.zeros_like(rewards), mask, lam=0.0, whiten=True, backend=backend).advantages
    exact = whiten(rewards.double(), mask)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
    single = gae(torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([[True], [False]]), whiten=True, backend=backend)
    assert single.advantages.tolist() == [[0.0], [0.0]]


@op_backends
@pytest.mark.parametrize(("rows", "steps"), [(300, 260), (3, 70_001)])
def test_large_batches(backend: str, rows: int, steps: int) -> None:
    """Enough for several threads, and more steps than 16 bits count."""
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(rows, steps, generator=g) for _ in range(2))
    mask = torch.rand(rows, steps, generator=g) < torch.tensor([0.2, 0.97, 1.0]).repeat(rows // 3)[:, None]
    lam = torch.linspace(0.9, 1, rows)
    out = gae(rewards, values, mask, gamma=0.999, lam=lam, lam_value=0.97, backend=backend)
    exact = gae(rewards.double(), values.double(), mask, gamma=0.999, lam=lam.double(), lam_value=0.97, backend="torch")
    for found, expected in zip(out, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@every_backend
def test_results_are_detached_and_inputs_unchanged(backend: str) -> None:
    rewards, values, mask = batch()
    before = rewards.clone(), values.clone(), mask.clone()
    lam, bootstrap = torch.full((B,), 0.9, requires_grad=True), torch.ones(B, requires_grad=True)
    out = gae(
        rewards.requires_grad_(), values.requires_grad_(), mask, lam=lam, bootstrap=bootstrap, whiten=True, backend=backend
    )
    assert not any(x.requires_grad for x in out)
    assert all(torch.equal(x.detach(), y) for x, y in zip((rewards, values, mask), before, strict=True))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"lam": torch.linspace(0, 1, B), "lam_value": 1.0, "bootstrap": torch.ones(B), "whiten": True, "gamma": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "everything"])
@op_backends
def test_opcheck(backend: str, options: dict[str, Any]) -> None:
    rewards, values, mask = batch()
    rows = [x if isinstance(x := options.get(name), Tensor) else None for name in ("lam", "lam_value")]
    numbers = [None if isinstance(x := options.get(name), Tensor) else x for name in ("lam", "lam_value")]
    arguments = (
        rewards,
        values,
        mask,
        options.get("bootstrap"),
        *rows,
        options.get("gamma", 1.0),
        numbers[0] or 0.9,
        numbers[1],
    )
    torch.library.opcheck(torch.ops.dppo_kernels.gae.default, (*arguments, options.get("whiten", False), False, backend))


@op_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_are_contiguous_whatever_the_inputs_are(backend: str, dtype: torch.dtype) -> None:
    transposed = [x.t().contiguous().t() for x in batch(dtype)]
    for whiten_advantages in (False, True):
        out = gae(*transposed, whiten=whiten_advantages, backend=backend)
        expected = gae(*batch(dtype), whiten=whiten_advantages, backend=backend)
        assert all(x.is_contiguous() for x in out)
        assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))


@op_backends
def test_compiled_equals_eager_in_one_graph(backend: str) -> None:
    rewards, values, mask = batch()

    def scaled(rewards: Tensor, values: Tensor, mask: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        out = gae(rewards, values, mask, lam=lam, lam_value=1.0, whiten=True, backend=backend)
        return out.advantages * 2, out.returns

    lam = torch.linspace(0, 1, B)
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(rewards, values, mask, lam), scaled(rewards, values, mask, lam), strict=True):
        assert torch.equal(found, expected)


def test_autocast_changes_nothing() -> None:
    rewards, values, mask = batch()
    expected = gae(rewards, values, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = gae(rewards, values, mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


ONES = torch.ones(B)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rewards": [1.0]}, TypeError, "`rewards` must be a torch.Tensor, got list"),
    ({"rewards": torch.ones(B, T, dtype=torch.long)}, TypeError, "`rewards` must have a floating-point dtype, got torch.int64"),
    ({"values": torch.ones(B, T, dtype=torch.bool)}, TypeError, "`values` must have a floating-point dtype, got torch.bool"),
    ({"mask": torch.ones(B, T)}, TypeError, "`mask` must be a bool tensor (True = counts), got torch.float32"),
    ({"rewards": torch.ones(T)}, ValueError, f"`rewards` must be [B, T], got [{T}]"),
    (
        {"values": torch.ones(B, T + 1)},
        ValueError,
        f"`values` must have shape that of `rewards` = [{B}, {T}], got [{B}, {T + 1}]",
    ),
    ({"mask": torch.ones(B, 1).bool()}, ValueError, f"`mask` must have shape that of `rewards` = [{B}, {T}], got [{B}, 1]"),
    ({"values": torch.ones(B, T, device="meta")}, ValueError, "`values` is on meta, but `rewards` is on cpu"),
    ({"bootstrap": ONES.long()}, TypeError, "`bootstrap` must have a floating-point dtype, got torch.int64"),
    ({"bootstrap": torch.ones(B, 1)}, ValueError, f"`bootstrap` must have shape [B] = [{B}], got [{B}, 1]"),
    ({"bootstrap": ONES.to("meta")}, ValueError, "`bootstrap` is on meta, but `rewards` is on cpu"),
    ({"gamma": 1.01}, ValueError, "`gamma` must be in [0, 1], got 1.01"),
    ({"gamma": torch.tensor(1.0)}, TypeError, "`gamma` must be a number, got Tensor"),
    ({"lam": -0.1}, ValueError, "`lam` must be in [0, 1], got -0.1"),
    ({"lam": None}, TypeError, "`lam` must be a number, got NoneType"),
    ({"lam": float("nan")}, ValueError, "`lam` must be finite, got nan"),
    ({"lam_value": 2}, ValueError, "`lam_value` must be in [0, 1], got 2"),
    ({"lam_value": "1"}, TypeError, "`lam_value` must be a number, got str"),
    ({"lam": torch.tensor(0.9)}, ValueError, f"`lam` must have shape [B] = [{B}], got []"),
    ({"lam": ONES.long()}, TypeError, "`lam` must have a floating-point dtype, got torch.int64"),
    ({"lam": ONES.to("meta")}, ValueError, "`lam` is on meta, but `rewards` is on cpu"),
    ({"lam": ONES * 1.5}, ValueError, "`lam` must be in [0, 1]; got 1.5 in row 0"),
    ({"lam_value": torch.tensor([1.0, 0, torch.nan, 1, 1])}, ValueError, "`lam_value` must be in [0, 1]; got nan in row 2"),
    ({"backend": "fast"}, ValueError, "`backend` must be one of"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' cannot serve gae: this version has no cuda implementation of it"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_errors_name_the_argument(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = dict(zip(("rewards", "values", "mask"), batch(), strict=True)) | change
    with pytest.raises(kind, match=re.escape(message)):
        gae(**arguments)


def test_the_reference_checks_lambdas_as_well() -> None:
    with pytest.raises(ValueError, match=r"got 1\.5 in row 0"):
        gae(*batch(), lam=ONES * 1.5, backend="reference")


def test_auto_on_cpu() -> None:
    assert _backend.resolve("gae", None, torch.device("cpu"), torch.float64) in ("cpp", "torch")
