"""Rows that are shared out over ranks: with a denominator of all ranks, gradients and statistics add up to one process's."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dppo_kernels import PRESETS, Stat, linear_distill_loss, linear_policy_loss, linear_preference_loss
from tests.distributed.gang import Gang

V, H, B, T = 37, 12, 8, 9
LOSSES = ("ppo", "dapo", "gspo", "grpo", "dr_grpo", "distill", "preference")


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(B, T, generator=g) < 0.7
    return {
        "hidden": torch.randn(B, T, H, generator=g, dtype=torch.float64),
        "weight": torch.randn(V, H, generator=g, dtype=torch.float64),
        "ids": torch.randint(0, V, (B, T), generator=g),
        "anchor": -4 + torch.rand(B, T, generator=g, dtype=torch.float64),
        "advantages": torch.randn(B, generator=g, dtype=torch.float64),
        "mask": mask,
    }


def loss_of(name: str, x: dict[str, Tensor], denominator: float | None) -> tuple[Tensor, dict[str, Stat]]:
    if name == "distill":
        teacher = torch.roll(x["weight"].detach(), 1, 0)
        return linear_distill_loss(x["hidden"], x["weight"], x["hidden"].detach(), teacher, x["mask"], denominator=denominator)
    if name == "preference":
        ref = x["anchor"].sum(1)
        return linear_preference_loss(x["hidden"], x["weight"], x["ids"], x["mask"], ref_logprobs=ref, denominator=denominator)
    arguments = (x["hidden"], x["weight"], x["ids"], x["anchor"], x["advantages"], x["mask"])
    return linear_policy_loss(*arguments, spec=PRESETS[name], denominator=denominator, max_length=T + 3)


def denominator_of(name: str, mask: Tensor) -> float:
    """What the whole batch divides by."""
    if name == "preference":
        return mask.shape[0] / 2
    if name in ("grpo", "gspo"):
        return float(mask.shape[0])
    return float(mask.shape[0] * (T + 3)) if name == "dr_grpo" else float(mask.sum())


def rows_of(name: str, ranks: int, rank: int) -> Tensor:
    """Sequences of a rank; the rejected sequence of a pair goes with the chosen one. The last rank has more than the first."""
    pairs = name == "preference"
    n = B // 2 if pairs else B
    cuts = [n * r // ranks for r in range(ranks)] + [n]
    mine = torch.arange(cuts[rank], cuts[rank + 1])
    return torch.cat([mine, mine + n]) if pairs else mine


def _shared_out(name: str, honest: bool) -> tuple[float, float, float]:
    """(error of the loss, of the gradient, of the statistics) of all ranks together against one process."""
    whole = batch()
    whole["weight"].requires_grad_()
    whole["hidden"].requires_grad_()
    loss, stats = loss_of(name, whole, None)
    loss.backward()
    rows = rows_of(name, dist.get_world_size(), dist.get_rank())
    mine = {key: x.detach() if key == "weight" else x.detach()[rows] for key, x in batch().items()}
    mine["weight"].requires_grad_()
    mine["hidden"].requires_grad_()
    local, found = loss_of(name, mine, denominator_of(name, whole["mask"]) if honest else None)
    local.backward()
    total = local.detach().clone()
    for x in (total, mine["weight"].grad):
        dist.all_reduce(x)
    dhidden = (mine["hidden"].grad - whole["hidden"].grad[rows]).abs().max()
    errors: list[Any] = [(mine["weight"].grad - whole["weight"].grad).abs().max(), dhidden]
    of_stats = 0.0
    for key, stat in stats.items():
        parts = [x.double().clone() for x in found[key]]
        for x, op in zip(parts, (dist.ReduceOp.SUM, dist.ReduceOp.SUM, dist.ReduceOp.MAX), strict=True):
            dist.all_reduce(x, op)
        # Statistics are kept in float32.
        of_stats = max(of_stats, *(abs(float(a) / float(b) - 1) if b else float(a) for a, b in zip(parts, stat, strict=True)))
    return abs(float(total - loss)), max(map(float, errors)), of_stats


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_add_up_to_one_process(gang: Gang, name: str) -> None:
    for of_loss, of_gradient, of_stats in gang.run(_shared_out, name, True):
        assert of_loss < 1e-10
        assert of_gradient < 1e-10
        assert of_stats < 1e-6


def test_a_local_denominator_would_be_noticed(gangs: dict[int, Gang]) -> None:
    for of_loss, of_gradient, _ in gangs[2].run(_shared_out, "dapo", False):
        assert of_loss > 1e-3
        assert of_gradient > 1e-3
