"""Triton kernels on given logits against float64, in the interpreter and (marked gpu) on a device."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from dppo_kernels import token_logprobs
from dppo_kernels._row_stats import Upstream
from dppo_kernels.token_logprobs import kernels
from tests.linear_logprobs.test_kernels import CASE, DEVICES, INTERPRETED
from tests.numerics import assert_as_exact_as_torch
from tests.strategies import IGNORE, ScoringCase, scoring_cases

OUTPUTS = ("logprobs", "lse", "entropy")


def run(case: ScoringCase, dtype: torch.dtype, backend: str, inplace: bool, device: str = "cpu") -> dict[str, Tensor]:
    leaf = case.logits().to(device, dtype).requires_grad_()
    gather_ids, temperature = (
        x.to(device)[None] if isinstance(x, Tensor) else x for x in (case.gather_ids(), case.row_temperature())
    )
    logits = leaf[None] * 1 if inplace else leaf[None]
    out = token_logprobs(
        logits,
        case.ids().to(device)[None],
        gather_ids=gather_ids,
        temperature=temperature,
        outputs=OUTPUTS,
        inplace_backward=inplace,
        backend=backend,
    )
    values = {name: value.cpu() for name, value in out._asdict().items() if value is not None}
    g = torch.Generator().manual_seed(case.seed + 1)
    loss = sum((value * torch.randn(value.shape, generator=g)).sum() for value in values.values())
    return {**values, "dlogits": torch.autograd.grad(loss, leaf)[0].cpu()}


@pytest.mark.parametrize("device", DEVICES)
@given(case=scoring_cases(dtypes=(torch.float32,)), inplace=st.booleans())
@example(case=CASE, inplace=True)
@INTERPRETED
def test_as_exact_as_torch(device: str, case: ScoringCase, inplace: bool) -> None:
    values = run(case, torch.float32, "triton", inplace, device)
    in_torch, exact = (run(case, dtype, "reference", False) for dtype in (torch.float32, torch.float64))
    temperature = case.row_temperature()
    coldest = temperature.min().item() if isinstance(temperature, Tensor) and case.rows else 0.1
    largest = case.logits().abs().max().item() / coldest if case.rows else 1.0
    for name, value in values.items():
        assert_as_exact_as_torch(name, value, in_torch[name], exact[name], largest=largest)


@pytest.mark.parametrize("device", DEVICES)
@given(case=scoring_cases(dtypes=(torch.bfloat16, torch.float16)))
@settings(INTERPRETED, max_examples=5)
def test_statistics_of_16_bit_logits_are_float32(device: str, case: ScoringCase) -> None:
    values = run(case, case.dtype, "triton", False, device)
    exact = run(case, torch.float64, "reference", False)
    scale = 1 + (case.logits().abs().max().item() * 10 if case.rows else 0)
    for name in OUTPUTS:
        assert values[name].dtype == torch.float32
        torch.testing.assert_close(values[name].double(), exact[name], rtol=0, atol=1e-6 * scale)


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 150, generator=g)[:, :-1]  # [3, 7, 150]: does not fold into rows
    ids, gather_ids = torch.randint(0, 150, (21,), generator=g), torch.randint(-1, 150, (21, 4), generator=g)
    gather_ids[:, 1], gather_ids[:, 2] = gather_ids[:, 0], ids
    ids[::5] = IGNORE
    return logits.to(device), ids.to(device), gather_ids.to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_dead_rows_are_not_read_and_written_as_zeros(device: str) -> None:
    logits, ids, gather_ids = inputs(device)
    upstream = torch.randn(21, generator=torch.Generator().manual_seed(1)).to(device)
    upstream[::2] = 0
    grads = Upstream(upstream, None, upstream, upstream[:, None].expand(21, 4))
    settings_ = {"ignore_index": IGNORE}
    saved = kernels.token_logprobs_fwd(logits, ids, gather_ids, 0.7, outputs=frozenset(OUTPUTS), **settings_)
    clean, poisoned = torch.full_like(logits, torch.nan), logits.clone()
    kernels.token_logprobs_bwd(logits, ids, gather_ids, 0.7, grads, saved, dlogits=clean, **settings_)
    dead = ((ids == IGNORE) | (upstream == 0)).view(3, 7)
    assert clean.isfinite().all()
    assert not clean[dead].any()
    assert clean[~dead].any(-1).all()
    poisoned[(ids == IGNORE).view(3, 7)] = torch.nan
    again = kernels.token_logprobs_fwd(poisoned, ids, gather_ids, 0.7, outputs=frozenset(OUTPUTS), **settings_)
    assert all(torch.equal(again[name], value) for name, value in saved.items())
    poisoned[dead] = torch.nan
    kernels.token_logprobs_bwd(poisoned, ids, gather_ids, 0.7, grads, saved, dlogits=poisoned, **settings_)  # in place
    assert torch.equal(poisoned, clean)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_in_any_batch(device: str) -> None:
    logits, ids, gather_ids = inputs(device)
    whole = kernels.token_logprobs_fwd(logits, ids, gather_ids, 1.0, ignore_index=IGNORE, outputs=frozenset(OUTPUTS))
    order = torch.randperm(21, generator=torch.Generator().manual_seed(2))[:9].to(device)
    rows = logits[order // 7, order % 7][None]
    part = kernels.token_logprobs_fwd(rows, ids[order], gather_ids[order], 1.0, ignore_index=IGNORE, outputs=frozenset(OUTPUTS))
    assert all(torch.equal(value, whole[name][order]) for name, value in part.items())


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits_on_the_device() -> None:
    n, vocab = 14200, 151936
    logits = torch.zeros(1, n, vocab, device="cuda", dtype=torch.bfloat16)
    logits[0, -1, -1] = 10
    ids = torch.full((n,), vocab - 1, device="cuda")
    out = token_logprobs(logits[0], ids, backend="triton").logprobs
    assert out[0].item() == pytest.approx(-torch.tensor(vocab).double().log().item(), abs=1e-4)
    expected = 10 - (torch.tensor(10.0).double().exp() + vocab - 1).log()
    assert out[-1].item() == pytest.approx(expected.item(), abs=1e-4)
