"""The work that a fused call does, counted on the torch path; and what TRL's scoring does, counted the same way."""

import pytest
import torch

from dppo_kernels import PREFERENCE_LOSSES, PreferenceSpec, linear_preference_loss
from dppo_kernels._tiling import MIN_ROWS
from dppo_kernels.linear_logprobs import group_design
from dppo_kernels.linear_logprobs.groups import runs
from dppo_kernels.linear_preference_loss import op
from tests.census import GemmFlops, LargestTensor

P, T, H, H_REF, V = 3, 20, 8, 11, 211
ROW = 4 * V  # bytes of a row of exponentials
EVERYTHING = 1 << 30


def flops(trained: tuple[str, ...] = ("hidden", "weight"), *, ref: bool = False, prompt: int = 0, **changes) -> float:
    """GEMM FLOPs of forward and backward of a call whose rows from `prompt` on count, in units of H V per counted row."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2 * P, T, H, generator=g), torch.randn(V, H, generator=g) / H**0.5
    for name, x in (("hidden", hidden), ("weight", weight)):
        x.requires_grad_(name in trained)
    ids = torch.randint(0, V, (2 * P, T), generator=g)
    mask = torch.ones(2 * P, T, dtype=torch.bool)
    mask[:, :prompt] = False
    reference = {"ref_logprobs": torch.full((2 * P,), -60.0)}
    if ref:
        reference = {"ref_hidden": torch.randn(2 * P, T, H_REF, generator=g), "ref_weight": torch.randn(V, H_REF, generator=g)}
    count = GemmFlops()
    with pytest.MonkeyPatch.context() as patch:
        # The op's implementation itself: a dispatch mode sees nothing through a custom op.
        patch.setattr(torch.ops.dppo_kernels, "linear_preference_loss", lambda *args: counted(count, *args))
        linear_preference_loss(hidden, weight, ids, mask, **(reference | changes))
    return count.flops / (H * V * max(int(mask.sum()), 1))


def counted(count: GemmFlops, *args):
    with torch.no_grad(), count:
        return op._compute(*args)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_six_units_for_every_loss(name: str) -> None:
    spec = PreferenceSpec(name, label_smoothing=0.1)
    assert flops(spec=spec, workspace_bytes=EVERYTHING) == (
        4 if name == "sft" else 6
    )  # of "sft" the rejected half has no gradient


@pytest.mark.parametrize(
    ("trained", "expected"), [(("hidden", "weight"), 6), (("hidden",), 4), (("weight",), 4), ((), 2)], ids=str
)
@pytest.mark.parametrize("prompt", [0, 13])
def test_only_completion_rows_are_worked_on(trained: tuple[str, ...], expected: int, prompt: int) -> None:
    assert flops(trained, prompt=prompt, workspace_bytes=EVERYTHING) == expected


@pytest.mark.parametrize("workspace", [0, 2 * T * ROW, EVERYTHING])
def test_the_reference_costs_one_projection(workspace: int) -> None:
    alone, both = flops(workspace_bytes=workspace), flops(ref=True, workspace_bytes=workspace)
    assert both == pytest.approx(alone + 2 * H_REF / H)


def test_what_does_not_fit_is_projected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of 40 rows in two slots of 16: chunks 16, 16, 8, of which the first and the last are kept."""
    monkeypatch.setattr(group_design, "TARGET_ROWS", {"cpu": 16})
    assert flops(workspace_bytes=32 * ROW) == pytest.approx(6 + 2 * 16 / 40)
    # Sorted pairs are one group of 120: all but the first and the last chunk are projected again.
    assert flops(spec=PreferenceSpec("aot"), workspace_bytes=32 * ROW) == pytest.approx(6 + 2 * (120 - 16 - 8) / 120)
    assert flops(workspace_bytes=32 * ROW, prompt=4) == 6  # pairs of 32 fit


def test_the_strict_mode_and_wpo_recompute() -> None:
    assert flops(workspace_bytes=0) == 8
    assert flops(spec=PreferenceSpec(use_weighting=True), workspace_bytes=EVERYTHING) == 8


def test_rewards_that_are_saturated_leave_before_the_gradient() -> None:
    """The hinge of pairs beyond the margin: scored, no more."""
    far = torch.cat([torch.full((P,), -(10.0**6)), torch.zeros(P)])
    assert flops(spec=PreferenceSpec("hinge"), ref_logprobs=far, workspace_bytes=EVERYTHING) == 2


def test_outputs_need_no_gemm() -> None:
    asked = ("entropy", "is_top1", "mean_logits")
    assert flops(outputs=asked, workspace_bytes=EVERYTHING) == 6


def test_trl_projects_every_row_and_recomputes() -> None:
    """Its function does 8 N H V with a trained head, prompts and padding included; the reference comes on top."""
    kernels = pytest.importorskip("trl.kernels.chunked_logprob", reason="the trl extra is not installed")
    n, h = 30, 8
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(V, h, requires_grad=True)
    with GemmFlops() as theirs:
        logprobs, *_ = kernels.ChunkedLogProbFunction.apply(
            hidden, weight, None, torch.randint(0, V, (n,)), 1.0, 16, None, 1.0, ("log_probs",)
        )
        logprobs.sum().backward()
    assert theirs.flops == 8 * n * h * V


def test_no_tensor_exceeds_the_workspace() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2 * P, T, H, generator=g), torch.randn(V, H, generator=g)
    ids, mask = torch.randint(0, V, (2 * P, T), generator=g), torch.ones(2 * P, T, dtype=torch.bool)
    largest = LargestTensor()

    def watched(*args):
        with torch.no_grad(), largest:
            return op._compute(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.dppo_kernels, "linear_preference_loss", watched)
        linear_preference_loss(hidden, weight, ids, mask, ref_logprobs=torch.zeros(2 * P), workspace_bytes=MIN_ROWS * ROW)
    assert largest.nbytes == MIN_ROWS * ROW
    assert largest.nbytes > 4 * max(V * H, 2 * P * T * H)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3, 4, 2], [(0, 2, 7), (2, 3, 2)]),
        ([9, 1, 1], [(0, 1, 9), (1, 3, 2)]),
        ([0, 0, 3, 0, 9], [(0, 4, 3), (4, 5, 9)]),
        ([0, 0], []),
        ([], []),
    ],
)
def test_runs_of_sequences(counts: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert list(runs(counts, 8)) == expected
