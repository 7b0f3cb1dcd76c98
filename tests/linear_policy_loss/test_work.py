"""The designs: which one serves a call, and that each does the work it claims."""

from typing import NamedTuple

import pytest
import torch

from dppo_kernels import PRESETS, PolicyLossSpec, linear_logprobs, linear_policy_loss
from dppo_kernels._tiling import MIN_ROWS
from dppo_kernels.linear_logprobs import group_design
from dppo_kernels.linear_logprobs.group_design import Design, choose_design
from dppo_kernels.linear_logprobs.groups import GroupTask
from dppo_kernels.linear_policy_loss import op
from dppo_kernels.linear_policy_loss.task import Task, Totals
from tests.census import GemmFlops, LargestTensor

B, T, H, V = 6, 20, 8, 211
N = B * T
ROW = 4 * V  # bytes of a row of exponentials


class Call(NamedTuple):
    """What `op._run` is given."""

    task: Task
    group: GroupTask
    totals: Totals


def captured(spec: PolicyLossSpec, needs: tuple[bool, bool] = (True, True), **changes) -> Call:
    """The call: 5 tokens a sequence behind the mask, sequence 0 without advantage, every second token far off."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, H, generator=g), torch.randn(V, H, generator=g) / H**0.5
    ids = torch.randint(0, V, (B, T), generator=g)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, :5] = False
    advantages = torch.ones(B)
    advantages[0] = 0
    anchor = linear_logprobs(hidden, weight, ids).logprobs
    anchor[:, ::2] -= 1  # ratio e: clipped where A > 0
    arguments = {"ids": ids, "anchor_logprobs": anchor, "advantages": advantages, "loss_mask": mask, "spec": spec, **changes}
    calls = []
    real = op._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_run", lambda *call: calls.append(Call(*call[:3])) or real(*call))
        linear_policy_loss(hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1]), **arguments)
    return calls[0]


def flops(call: Call) -> float:
    """GEMM FLOPs in units of H V."""
    with torch.no_grad(), GemmFlops() as count:
        op._run(*call, "torch")
    return count.flops / (H * V)


N1 = (B - 1) * (T - 5)
N2 = (B - 1) * len([t for t in range(5, T) if t % 2])


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        pytest.param((True, True), 2 * N1 + 4 * N2, id="trained"),
        pytest.param((True, False), 2 * N1 + 2 * N2, id="frozen head"),
        pytest.param((False, True), 2 * N1 + 2 * N2, id="frozen hidden"),
        pytest.param((False, False), 2 * N1, id="no gradient"),
    ],
)
@pytest.mark.parametrize("workspace", [MIN_ROWS * ROW, 50 * ROW, 1 << 30])
def test_flops_with_the_gradient_in_the_forward(needs: tuple[bool, bool], expected: int, workspace: int) -> None:
    call = captured(PRESETS["dapo"], needs, workspace_bytes=workspace)
    assert call.group.design.name == ("forward" if any(needs) else "score")
    assert flops(call) == expected


def test_all_active_costs_six() -> None:
    spec = PRESETS["cispo"]
    call = captured(spec, loss_mask=torch.ones(B, T, dtype=torch.bool), advantages=torch.ones(B))
    assert flops(call) == 6 * N


def test_tokens_outside_the_trust_region_leave_before_the_gradient() -> None:
    tight = PRESETS["dppo_binary_tv"].replace(epsilon_low=1e-6, epsilon_high=1e-6)
    assert flops(captured(tight)) == 2 * N1 + 4 * N2
    assert flops(captured(PRESETS["dppo_binary_tv"].replace(epsilon_high=1.0))) == 6 * N1


def test_scoring_inactive_tokens_costs_their_projection() -> None:
    assert flops(captured(PRESETS["dapo"], score_inactive=True)) == 2 * B * (T - 5) + 4 * N2


@pytest.mark.parametrize("spec", [PRESETS["dapo"].replace(beta=0.1), PRESETS["dapo"].replace(entropy_coef=0.1)])
def test_a_term_on_every_token_keeps_every_token(spec: PolicyLossSpec) -> None:
    ref = {"ref_logprobs": torch.full((B, T), -3.0)} if spec.beta else {}
    assert flops(captured(spec, **ref)) == 6 * B * (T - 5)


def test_the_strict_mode_recomputes() -> None:
    call = captured(PRESETS["dapo"], workspace_bytes=0)
    assert call.group.design.name == "recompute"
    assert flops(call) == 2 * N1 + 6 * N2


@pytest.mark.parametrize("workspace", [0, 1 << 30])
def test_nothing_active_runs_no_gemm(workspace: int) -> None:
    call = captured(PRESETS["gspo"], advantages=torch.zeros(B), workspace_bytes=workspace)
    assert flops(call) == 0
    call = captured(PRESETS["dapo"], loss_mask=torch.zeros(B, T, dtype=torch.bool), workspace_bytes=workspace)
    assert flops(call) == 0


def gspo_task(rows: int) -> Call:
    spec = PRESETS["gspo"].replace(epsilon_low=0.9, epsilon_high=9.0)  # nothing clipped
    return captured(spec, workspace_bytes=rows * ROW)


def test_sequence_level_costs_six_where_a_sequence_fits() -> None:
    call = gspo_task(40)
    assert call.group.design == Design("keep", 40, 1, recomputed=False)
    assert flops(call) == 6 * N1


def test_sequence_level_recomputes_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of 15 active rows in slots of 4 + 4: chunks 4, 4, 4, 3, of which the first and the last are kept."""
    monkeypatch.setattr(group_design, "TARGET_ROWS", {"cpu": 4})
    monkeypatch.setattr(group_design, "MIN_ROWS", 1)
    call = gspo_task(8)
    assert call.group.design == Design("keep", 4, 2, recomputed=True)
    assert flops(call) == 6 * N1 + 2 * 8 * (B - 1)


NO_CHUNK = "the workspace holds no chunk of rows"
NO_RANGE = "exponentials need the exponent range of bfloat16 or float32"


def choose(**changes) -> Design:
    arguments = {
        "n_rows": 1000,
        "longest_sequence": 100,
        "vocab": 1000,
        "element_size": 4,
        "needs_gradient": True,
        "by_sequence": False,
        "workspace_bytes": 1 << 20,
        "target_rows": 256,
    }
    return choose_design(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"needs_gradient": False}, Design("score"), id="no gradient"),
        pytest.param({}, Design("forward", 250, 1), id="balanced chunks"),
        pytest.param({"workspace_bytes": 100 * 4000}, Design("forward", 100, 1), id="bounded by the workspace"),
        pytest.param({"workspace_bytes": 15 * 4000}, Design("recompute", why=NO_CHUNK), id="fewer rows than a GEMM needs"),
        pytest.param({"workspace_bytes": 15 * 4000, "n_rows": 15}, Design("forward", 15, 1), id="few rows fit whole"),
        pytest.param({"n_rows": 0}, Design("forward", 1, 1), id="no rows"),
        pytest.param({"by_sequence": True}, Design("keep", 131, 2), id="sequences"),
        pytest.param({"by_sequence": True, "longest_sequence": 300}, Design("keep", 131, 2, True), id="long sequences"),
        pytest.param({"by_sequence": True, "workspace_bytes": 0}, Design("recompute", why=NO_CHUNK), id="sequences, strict"),
        pytest.param({"row_multiple": 128}, Design("forward", 256, 1), id="whole blocks"),
        pytest.param({"row_multiple": 128, "n_rows": 50}, Design("forward", 128, 1), id="less than a block"),
        pytest.param(
            {"row_multiple": 128, "workspace_bytes": 127 * 4000}, Design("recompute", why=NO_CHUNK), id="no block fits"
        ),
        pytest.param({"row_multiple": 128, "by_sequence": True}, Design("keep", 256, 1), id="sequences in blocks"),
        pytest.param({"exponent_range": False}, Design("recompute", why=NO_RANGE), id="float16 kernels"),
    ],
)
def test_one_design_per_regime(changes: dict, expected: Design) -> None:
    assert choose(**changes) == expected


def test_no_tensor_exceeds_the_workspace() -> None:
    for spec in (PRESETS["dapo"], PRESETS["gspo"], PRESETS["dapo"].replace(entropy_coef=0.1)):
        call = captured(spec, workspace_bytes=MIN_ROWS * ROW, softcap=5.0)
        with torch.no_grad(), LargestTensor() as largest:
            op._run(*call, "torch")
        assert (MIN_ROWS - 4) * ROW <= largest.nbytes <= MIN_ROWS * ROW, spec  # chunks are balanced
        assert largest.nbytes > 4 * max(V * H, N * H)
