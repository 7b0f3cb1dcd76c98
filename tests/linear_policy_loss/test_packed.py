"""Sequences packed into [N] with `cu_seqlens` against the same ones padded to [B, T]: every preset, fused and not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import PRESETS, aggregate, linear_policy_loss, policy_loss
from dppo_kernels.linear_logprobs import group_design
from tests.linear_policy_loss.cases import PolicyCase, policy_cases

PER_TOKEN = ("ids", "anchor_logprobs", "ref_logprobs", "token_weights", "loss_mask", "temperature")
TOPK = ("rollout_topk_ids", "rollout_topk_logprobs", "topk_valid")
WORKSPACES = (0, 16 * 123 * 8, 1 << 20)


def packed(case: PolicyCase, lengths: list[int]) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """(arguments of [B, T], those of [N], which of the padded rows are packed); row b keeps its first lengths[b]."""
    arguments = case.arguments()
    inside = torch.arange(case.t) < torch.tensor(lengths)[:, None]
    arguments["loss_mask"] = arguments["loss_mask"] & inside
    flat = dict(arguments)
    for name in (*PER_TOKEN, *TOPK, "advantages"):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.shape[:2] == inside.shape:
            flat[name] = value[inside]
    flat["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    if arguments["advantages"].dim() == 1 and case.b == sum(lengths):
        flat["advantages"] = flat["advantages"][:, None]  # [B] would be taken for [N]
    return arguments, flat, inside


def run(case: PolicyCase, arguments: dict[str, Any], inside: Tensor | None, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Loss, gradients (those of hidden packed), statistics."""
    hidden, weight, bias = (None if x is None else x.to(dtype).requires_grad_() for x in case.leaves())
    rows = hidden if inside is None else hidden[inside]
    loss, stats, aux = linear_policy_loss(rows, weight, **arguments, bias=bias, return_aux=True, **options)
    loss.backward()
    moved = [torch.stack([x.double() for x in stat]).nan_to_num(posinf=0, neginf=0) for stat in stats.values()]
    grads = [x.grad for x in (hidden, weight, bias) if x is not None]
    return [loss.detach(), *grads, *moved, aux.logprobs]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(case=policy_cases(dtypes=(torch.float64,)), data=st.data())
def test_packed_equals_padded(backend: str, case: PolicyCase, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, case.t), min_size=case.b, max_size=case.b))
    padded, flat, inside = packed(replace(case, layout="contiguous"), lengths)
    options = {"backend": backend, "workspace_bytes": data.draw(st.sampled_from(WORKSPACES)), "score_inactive": True}
    *theirs, their_logprobs = run(case, padded, None, torch.float64, **options)
    *ours, our_logprobs = run(case, flat, inside, torch.float64, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if a.dim() == 1 and a.shape == (3,) else 1e-9, atol=1e-9)
    torch.testing.assert_close(our_logprobs, their_logprobs[inside], rtol=1e-9, atol=1e-9)


def test_one_advantage_a_sequence_where_there_are_as_many_tokens() -> None:
    """Three sequences and three tokens: [B, 1] is of sequences, [B] is [N]."""
    mask, offsets = torch.ones(3, dtype=torch.bool), torch.tensor([0, 0, 3, 3])
    arguments = (-torch.ones(3), -torch.ones(3))
    advantages = torch.tensor([5.0, 1.0, 7.0])
    of_sequences = policy_loss(*arguments, advantages[:, None], mask, spec=PRESETS["ppo"], cu_seqlens=offsets)[0]
    of_tokens = policy_loss(*arguments, advantages, mask, spec=PRESETS["ppo"], cu_seqlens=offsets)[0]
    assert (of_sequences.item(), of_tokens.item()) == (-1.0, pytest.approx(-13 / 3))


@pytest.mark.parametrize("preset", ["gspo", "sapo", "grpo"])
def test_kernels_pack_too(preset: str) -> None:
    case = PolicyCase(preset, b=4, t=11, vocab=53, masked="none")
    padded, flat, inside = packed(case, [11, 3, 0, 7])
    *theirs, _ = run(case, padded, None, torch.float32, backend="torch")
    *ours, _ = run(case, flat, inside, torch.float32, backend="triton")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)


def test_a_sequence_may_exceed_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks take turns in the last slot; shorter ones share groups."""
    monkeypatch.setattr(group_design, "MIN_ROWS", 1)
    case = PolicyCase("gspo", b=5, t=40, dtype=torch.float64, masked="none", advantages="sequence")
    padded, flat, inside = packed(case, [3, 40, 0, 17, 1])
    expected = run(case, padded, None, torch.float64, backend="reference")
    for rows in (2, 8, 20):
        found = run(case, flat, inside, torch.float64, backend="torch", workspace_bytes=rows * case.vocab * 8)
        for a, b in zip(found[:3], expected[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_long_sequences_keep_their_digits() -> None:
    """Sums over 32768 tokens, in float32: as exact as padded ones."""
    t, g = 32768, torch.Generator().manual_seed(0)
    logprobs, anchor = (-torch.rand(1, t, generator=g) for _ in range(2))
    mask, spec = torch.ones(1, t, dtype=torch.bool), PRESETS["gspo"].replace(epsilon_low=0.9, epsilon_high=9.0)
    found = []
    for dtype, flat in ((torch.float64, False), (torch.float32, True)):
        x = logprobs.to(dtype).requires_grad_()
        args = [x, anchor.to(dtype), torch.ones(1), mask]
        more = {"cu_seqlens": torch.tensor([0, t])} if flat else {}
        policy_loss(*(v.flatten() if flat and v.dim() == 2 else v for v in args), spec=spec, **more)[0].backward()
        found.append(x.grad.double())
    assert ((found[0] - found[1]).abs().max() / found[0].abs().max()).item() < 1e-6


def test_sequences_do_not_mix() -> None:
    """Another sequence's tokens change neither the ratio nor the gradient of this one; its NaN behind the mask neither."""
    case = PolicyCase("gspo", b=2, t=6, dtype=torch.float64, masked="none", on_policy=True)
    _, flat, inside = packed(case, [6, 4])
    hidden, weight, _ = case.leaves()

    def gradient(changed: Tensor) -> Tensor:
        rows = changed[inside].requires_grad_()
        linear_policy_loss(rows, weight, **flat)[0].backward()
        return rows.grad

    other = hidden.clone()
    other[1] += 1.0
    assert torch.equal(gradient(hidden)[:6], gradient(other)[:6])
    assert not torch.equal(gradient(hidden)[6:], gradient(other)[6:])


def test_aggregate_of_packed_sequences() -> None:
    values, mask = torch.arange(6.0), torch.tensor([True, True, False, True, True, True])
    offsets = torch.tensor([0, 3, 3, 6])
    assert aggregate(values, mask, "sequence_mean", cu_seqlens=offsets).item() == pytest.approx((0.5 + 0 + 4) / 3)
    assert aggregate(values, mask, "fixed_length", max_length=4, cu_seqlens=offsets).item() == pytest.approx(13 / 12)
    assert aggregate(values, mask, "token_mean", cu_seqlens=offsets).item() == pytest.approx(13 / 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"cu_seqlens": torch.tensor([0, 3, 5])},
            ValueError,
            r"`cu_seqlens` must rise from 0 to the 6 packed rows, got \[0, 3, 5\]",
        ),
        ({"cu_seqlens": torch.tensor([1, 3, 6])}, ValueError, "must rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "must rise from 0"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "`cu_seqlens` must hold token ids as int64 or int32"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"`cu_seqlens` must be \[B \+ 1\] offsets, got shape \[1, 2\]"),
        ({"advantages": torch.ones(3)}, ValueError, r"`advantages` must have shape \[N\], or \[B\] of `cu_seqlens` = \[2\]"),
        ({"token_weights": torch.ones(3, 1)}, ValueError, "`token_weights` must be"),
        ({"cu_seqlens": None}, ValueError, r"needs \[B, T\] `logprobs`, or \[N\] with `cu_seqlens`"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"cu_seqlens": torch.tensor([0, 2, 6]), "advantages": torch.ones(2), "token_weights": None} | changes
    advantages = arguments.pop("advantages")
    with pytest.raises(error, match=message):
        policy_loss(-torch.ones(6), None, advantages, torch.ones(6, dtype=torch.bool), spec=PRESETS["gspo"], **arguments)


def test_padded_arguments_are_not_packed() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`cu_seqlens` is of packed `logprobs` \[N\], got \[2, 3\]"):
        policy_loss(-torch.ones(2, 3), None, torch.ones(2), mask, spec=PRESETS["ppo"], cu_seqlens=torch.tensor([0, 3, 6]))
