"""A frozen head: the gradient saved in the forward against float64, on torch and in Triton's interpreter; work and regimes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from dppo_kernels import explain_linear_logprobs, linear_logprobs
from dppo_kernels._row_stats import Upstream
from dppo_kernels._tiling import MIN_ROWS
from dppo_kernels.linear_logprobs import op, torch_impl, unit_gradient
from dppo_kernels.linear_logprobs.design import Design, choose_design
from dppo_kernels.linear_logprobs.projection import Needs, Projection
from tests.census import GemmFlops, LargestTensor, counted_kernels, linear_inputs
from tests.numerics import assert_as_exact_as_torch, bit_equal
from tests.strategies import IGNORE, ScoringCase, scoring_cases

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU of this machine")
BACKENDS = ["torch", pytest.param("triton", marks=INTERPRETED)]
CASE = ScoringCase(
    rows=33, hidden_size=33, vocab=123, n_gather=4, dtype=torch.float32, scale=4.0, layout="contiguous", temperature="per_row",
    ignored="some", bias=True, softcap=5.0, logit_scale=0.25, seed=1,
)  # fmt: skip
SHARP = replace(CASE, scale=30.0, softcap=None, temperature="cold", logit_scale=1.0)


def run(
    case: ScoringCase, dtype: torch.dtype, backend: str, device: str = "cpu", **options
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs, and hidden's gradient of a loss through all but the entropy; the sampled id is among the gathered ones."""
    hidden, weight, bias = (None if x is None else x.to(device, dtype) for x in case.hidden_and_head())
    gather_ids, temperature = case.gather_ids(), case.row_temperature()
    if gather_ids is not None:
        gather_ids[:, -1] = torch.where(case.ids() == IGNORE, 0, case.ids())
        gather_ids = gather_ids.to(device)
    out = linear_logprobs(
        hidden.requires_grad_(),
        weight,
        case.ids().to(device),
        bias=bias,
        gather_ids=gather_ids,
        temperature=temperature.to(device) if isinstance(temperature, Tensor) else temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        outputs=("logprobs", "lse", "entropy"),
        backend=backend,
        **options,
    )
    values = {name: value.cpu() for name, value in out._asdict().items() if value is not None}
    g = torch.Generator().manual_seed(case.seed + 1)
    differentiated = [values[name] for name in ("logprobs", "lse", "gathered") if name in values]
    loss = sum((value * torch.randn(value.shape, generator=g)).sum() for value in differentiated)
    return values, torch.autograd.grad(loss, hidden)[0].cpu()


def hold_to_reference(case: ScoringCase, backend: str, device: str = "cpu", **options) -> None:
    values, grad = run(case, case.dtype, backend, device, **options)
    exact, exact_grad = run(case, torch.float64, "reference")
    in_torch, torch_grad = run(case, torch.promote_types(case.dtype, torch.float32), "reference")
    largest = case.largest_logit()
    for name, value in values.items():
        assert_as_exact_as_torch(name, value, in_torch[name], exact[name], largest=largest)
    assert_as_exact_as_torch("dhidden", grad, torch_grad.to(case.dtype), exact_grad, largest=largest)


@given(case=scoring_cases(dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)))
@example(case=CASE)
@example(case=SHARP)
def test_as_exact_as_torch(case: ScoringCase) -> None:
    # Sixteen rows at a time, so that there are several chunks.
    hold_to_reference(
        case, "torch", workspace_bytes=MIN_ROWS * case.vocab * torch.promote_types(case.dtype, torch.float32).itemsize
    )


@INTERPRETED
@given(case=scoring_cases(dtypes=(torch.float32, torch.bfloat16)))
@example(case=CASE)
@example(case=SHARP)
@settings(max_examples=8)
def test_kernels_are_as_exact_as_torch(case: ScoringCase) -> None:
    hold_to_reference(case, "triton", workspace_bytes=MIN_ROWS * case.vocab * case.dtype.itemsize)


@pytest.mark.gpu
@given(case=scoring_cases())
@example(case=CASE)
@example(case=SHARP)
def test_kernels_are_as_exact_as_torch_on_the_device(case: ScoringCase) -> None:
    hold_to_reference(case, "triton", "cuda", workspace_bytes=MIN_ROWS * case.vocab * case.dtype.itemsize)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_certain_token_keeps_the_digits_of_its_gradient(backend: str) -> None:
    """1 - p is about 1e-7: ``W_t - P W`` would keep none of its digits."""
    weight = torch.randn(50, 16)
    hidden = weight[7] * 1.9
    scores = hidden @ weight.t()
    hidden *= 17 / (scores[7] - scores.topk(2).values[1])
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        x = hidden.to(dtype)[None].requires_grad_()
        out = linear_logprobs(x, weight.to(dtype), torch.tensor([7]), backend=name)
        assert -1e-6 < out.logprobs < -1e-9
        results.append(torch.autograd.grad(out.logprobs.sum(), x)[0].double())
    assert (results[0] - results[1]).abs().max() < 1e-5 * results[1].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved_leaves_the_picked_ids_out(backend: str) -> None:
    x, ids, gather_ids = projection(softcap=5.0, temperature=torch.rand(N) + 0.5)
    gather_ids[::3, 2] = -1
    saved = op.unit_implementation(backend)[0](x, ids, gather_ids, ignore_index=IGNORE, with_entropy=False, chunk_rows=16)
    bent = torch.tanh(x.hidden.double() @ x.weight.double().t() / 5)
    p = torch.softmax(5 * bent / x.temperature[:, None], -1) * (1 - bent.square())
    picked = torch.cat([ids.clamp(min=0)[:, None], gather_ids], 1)
    for n in range(4, N):
        p[n, picked[n][picked[n] >= 0]] = 0
    torch.testing.assert_close(saved["unit"][4:].double(), (p @ x.weight.double())[4:], rtol=1e-5, atol=1e-6)
    assert not saved["unit"][:4].any()


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for module, name in ((unit_gradient, "unit_gradient_bwd"), (torch_impl, "linear_logprobs_bwd")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, real=real, name=name, **y: seen.append(name) or real(*x, **y))
    return seen


def test_an_entropy_gradient_falls_back_to_recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    hidden, weight, ids, gather_ids = linear_inputs(20, 40, 8, 3)
    hidden.requires_grad_()
    out = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids, outputs=("logprobs", "entropy"))
    plain = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids, outputs=("logprobs", "entropy"), workspace_bytes=0)
    losses = [[x.logprobs.square().sum() + x.gathered.sum()] for x in (out, plain)]
    for loss, x in zip(losses, (out, plain), strict=True):
        loss.append(loss[0] + x.entropy.square().sum())
    for i, expected in ((0, "unit_gradient_bwd"), (1, "linear_logprobs_bwd")):
        ours, theirs = (torch.autograd.grad(loss[i], hidden, retain_graph=True)[0] for loss in losses)
        assert seen == [expected, "linear_logprobs_bwd"]
        seen.clear()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_backward_can_run_again_and_outputs_can_be_overwritten() -> None:
    hidden, weight, ids, gather_ids = linear_inputs(20, 40, 8, 3)
    hidden.requires_grad_()
    out = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids)
    loss = out.logprobs.sum() + 2 * out.gathered.sum()
    out.logprobs.mul_(0)
    out.gathered.mul_(0)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert bit_equal(first, second)
    again = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids)
    assert bit_equal(first, torch.autograd.grad(again.logprobs.sum() + 2 * again.gathered.sum(), hidden)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_gradient_are_not_read(backend: str) -> None:
    hidden, weight, ids, gather_ids = linear_inputs(20, 40, 8, 3)
    ids[::5] = IGNORE
    upstream = torch.ones(20)
    upstream[1::3] = 0
    grads = []
    for poison in (0.0, torch.nan):
        x = hidden.clone()
        x[::5] = poison
        x[1::3] = torch.where(torch.tensor(poison).isnan(), torch.nan, hidden[1::3])
        x.requires_grad_()
        out = linear_logprobs(x, weight, ids, gather_ids=gather_ids, backend=backend)
        grads.append(torch.autograd.grad(out.logprobs, x, upstream)[0])
    assert bit_equal(*grads)
    assert not grads[0][::5].any()
    assert not grads[0][1::3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_improbable_and_impossible_tokens(backend: str) -> None:
    """Row 3's id has a log-prob of about -250, row 5's of -inf; row 6 has gathered an impossible one."""
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        hidden, weight, ids, gather_ids = linear_inputs(20, 40, 8, 3)
        ids[3], ids[5], gather_ids[6, 1] = 7, 9, 9
        ids[torch.arange(20).ne(5) & ids.eq(9)] = 8
        weight[7] = 0
        weight[8] = 100 * hidden[3] / hidden[3].norm()
        bias = torch.zeros(40, dtype=dtype)
        bias[9] = -torch.inf
        x = hidden.to(dtype).requires_grad_()
        out = linear_logprobs(
            x, weight.to(dtype), ids, gather_ids=gather_ids, bias=bias, outputs=("logprobs", "entropy", "lse"), backend=name
        )
        (grad,) = torch.autograd.grad(out.logprobs.sum() + out.gathered[:, 0].sum() + out.lse.sum(), x)
        results.append([y.detach().double() for y in (out.logprobs, out.entropy, out.lse, out.gathered, grad)])
    assert results[1][0][3] < -100
    assert results[1][0][5] == -torch.inf
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-4)


N, V, H, K = 40, 203, 24, 5


def projection(**changes) -> tuple[Projection, Tensor, Tensor]:
    hidden, weight, ids, gather_ids = linear_inputs(N, V, H, K)
    ids[:4] = IGNORE
    return replace(Projection(hidden, weight, None, 1.0, 1.0, None, torch.float32), **changes), ids, gather_ids


def upstream() -> Upstream:
    return Upstream(torch.ones(N), torch.ones(N), None, torch.ones(N, K))


@pytest.mark.parametrize("chunk_rows", [16, 100])
def test_flops_are_four_in_the_forward_and_none_in_the_backward(chunk_rows: int) -> None:
    x, ids, gather_ids = projection()
    options = {"ignore_index": IGNORE, "with_entropy": True, "chunk_rows": chunk_rows}
    with GemmFlops() as forward:
        saved = unit_gradient.unit_gradient_fwd(x, ids, gather_ids, **options)
    assert forward.flops == 4 * (N - 4) * H * V
    with GemmFlops() as backward:
        unit_gradient.unit_gradient_bwd(x, ids, gather_ids, upstream(), saved, ignore_index=IGNORE)
    assert backward.flops == 0


def test_no_tensor_exceeds_the_workspace() -> None:
    x, ids, gather_ids = projection(softcap=5.0)
    x = replace(x, hidden=x.hidden[:, :4].contiguous(), weight=x.weight[:, :4].contiguous())  # the head is smaller than a chunk
    with LargestTensor() as largest:
        saved = unit_gradient.unit_gradient_fwd(x, ids, gather_ids, ignore_index=IGNORE, with_entropy=True, chunk_rows=16)
        unit_gradient.unit_gradient_bwd(x, ids, gather_ids, upstream(), saved, ignore_index=IGNORE)
    assert largest.nbytes <= 4 * 16 * V


@INTERPRETED
def test_elements_moved_by_the_kernels() -> None:
    """Forward: the head once per block of rows to project, once for U, and picked rows. Backward: picked rows alone."""
    from dppo_kernels.linear_logprobs import kernels_unit

    x, ids, gather_ids = projection()
    gather_ids[:, 1] = gather_ids[:, 0]  # read once in the backward
    active, blocks = N - 4, -(-(N - 4) // 16)
    with counted_kernels(hidden=x.hidden, weight=x.weight) as forward:
        saved = kernels_unit.unit_gradient_fwd(x, ids, gather_ids, ignore_index=IGNORE, with_entropy=True, chunk_rows=32)
    assert forward.loaded == {"hidden": active * H, "weight": 2 * blocks * V * H + active * (K + 1) * H}
    some = upstream()
    for grad in some:
        if grad is not None:
            grad[::2] = 0
    distinct = sum(len({int(ids[n]), *gather_ids[n].tolist()}) for n in range(5, N, 2))
    with counted_kernels(hidden=x.hidden, weight=x.weight, unit=saved["unit"]) as backward:
        kernels_unit.unit_gradient_bwd(x, ids, gather_ids, some, saved, ignore_index=IGNORE)
    assert backward.loaded == {"weight": distinct * H, "unit": len(range(5, N, 2)) * H}
    assert backward.launches == {"unit_gradient_kernel": 1}


@INTERPRETED
def test_buffers_of_the_kernels_need_not_be_clean() -> None:
    from dppo_kernels.linear_logprobs import kernels_unit

    x, ids, gather_ids = projection(softcap=5.0, temperature=torch.rand(N) + 0.5)

    def everything() -> list[Tensor]:
        saved = kernels_unit.unit_gradient_fwd(x, ids, gather_ids, ignore_index=IGNORE, with_entropy=True, chunk_rows=16)
        grad = kernels_unit.unit_gradient_bwd(x, ids, gather_ids, upstream(), saved, ignore_index=IGNORE)
        return [*saved.values(), grad]

    clean = everything()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory
    try:
        dirty = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bit_equal(a, b) for a, b in zip(clean, dirty, strict=True))


ROW = 1000 * 4


def choose(**changes) -> Design:
    arguments = {
        "needs": Needs(True, False, False),
        "outputs": ("logprobs", "entropy"),
        "vocab": 1000,
        "element_size": 4,
        "exponent_range": True,
        "keeps": True,
        "lora": False,
        "workspace_bytes": None,
        "default_bytes": 1 << 20,
        "target_rows": 256,
    }
    return choose_design(**(arguments | changes))


TRAINED = {"needs": Needs(True, True, False)}


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        pytest.param({}, ("unit", 256), "head frozen", id="frozen head"),
        pytest.param({"default_bytes": 100 * ROW}, ("unit", 100), "100 rows of exponentials", id="bounded by the default"),
        pytest.param({"workspace_bytes": 50 * ROW}, ("unit", 50), "4 n, and only gathers", id="bounded by the caller"),
        pytest.param({"outputs": ("gathered",)}, ("unit", 256), "", id="only gathered log-probs"),
        pytest.param({"outputs": ("lse",)}, ("unit", 256), "", id="only the LSE"),
        pytest.param({"workspace_bytes": 15 * ROW}, ("recompute", 0), "fewer than 16 rows", id="too small for GEMMs"),
        pytest.param({"workspace_bytes": 0}, ("recompute", 0), "workspace_bytes=0", id="strict"),
        pytest.param({"exponent_range": False}, ("recompute", 0), "exponent range", id="float16 kernels"),
        pytest.param({"outputs": ("entropy",)}, ("recompute", 0), "only the entropy", id="only the entropy"),
        pytest.param({"outputs": ("logprobs", "is_top1")}, ("recompute", 0), "is_top1 need the logits", id="other statistics"),
        pytest.param({"outputs": ("is_top1",)}, ("score", 0), "no output has a gradient", id="nothing differentiable"),
        pytest.param({"needs": Needs(False, False, False)}, ("score", 0), "no gradient is wanted", id="no gradient"),
        pytest.param(TRAINED, ("recompute", 0), "head is trained", id="trained head"),
        pytest.param({"needs": Needs(False, True, False)}, ("recompute", 0), "head is trained", id="frozen hidden"),
        pytest.param({"needs": Needs(True, False, True)}, ("recompute", 0), "head is trained", id="trained bias"),
        pytest.param(
            {"needs": Needs(True, False, False, True, True), "lora": True}, ("recompute", 0), "head is trained", id="LoRA"
        ),
        pytest.param(
            {"needs": Needs(True, False, False, True), "lora": True}, ("recompute", 0), "head has a LoRA", id="frozen LoRA"
        ),
        pytest.param({**TRAINED, "workspace_bytes": 50 * ROW}, ("keep", 50), "logits of up to 50 rows", id="kept logits"),
        pytest.param({**TRAINED, "workspace_bytes": ROW - 1}, ("recompute", 0), "holds no row", id="no room"),
        pytest.param(
            {**TRAINED, "workspace_bytes": 50 * ROW, "keeps": False},
            ("recompute", 0),
            "keeps no logits",
            id="kernels keep none",
        ),
        pytest.param(
            {"outputs": ("logprobs", "is_top1"), "workspace_bytes": 50 * ROW}, ("keep", 50), "kept", id="statistics, kept"
        ),
    ],
)
def test_one_design_per_regime(changes: dict, expected: tuple[str, int], said: str) -> None:
    design = choose(**changes)
    assert (design.name, design.rows) == expected
    assert said in design.explain()


def test_explained() -> None:
    assert explain_linear_logprobs(vocab=1000).startswith("torch: logits recomputed in the backward (the head is trained")
    frozen = explain_linear_logprobs(vocab=10**6, needs_gradient=(True, False, False), outputs=("logprobs", "gathered"))
    assert frozen.startswith("torch: logits recomputed in the backward (the workspace holds fewer than 16 rows)")
    assert "U = P W" in explain_linear_logprobs(vocab=10**5, needs_gradient=(True, False, False))
    assert explain_linear_logprobs(vocab=10, backend="reference").startswith("reference: ")
    with pytest.raises(ValueError, match="`workspace_bytes` must be an int >= 0, got -1"):
        explain_linear_logprobs(vocab=10, workspace_bytes=-1)


@pytest.mark.parametrize(
    ("needs", "context", "expected"),
    [
        ((True, False), torch.enable_grad, "unit"),
        ((True, True), torch.enable_grad, "recompute"),
        ((True, False), torch.no_grad, "score"),
    ],
)
def test_the_call_gets_the_design_of_its_regime(needs, context, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    real = op.choose_design
    monkeypatch.setattr(op, "choose_design", lambda **x: found.append(real(**x)) or found[-1])
    hidden, weight, ids, _ = linear_inputs(20, 40, 8, 3)
    with context():
        linear_logprobs(hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1]), ids)
    assert [design.name for design in found] == [expected]


def test_opcheck() -> None:
    hidden, weight, ids, gather_ids = linear_inputs(5, 30, 8, 3)
    for outputs, gathered, cap in (("logprobs,lse", gather_ids, 4.0), ("logprobs,entropy", None, None)):
        args = (
            hidden.requires_grad_(),
            weight,
            None,
            None,
            None,
            ids,
            gathered,
            None,
            0.7,
            1.0,
            cap,
            IGNORE,
            torch.float32,
            "",
            [],
        )
        result = torch.library.opcheck(op._forward_op, (*args, outputs, "unit", 16, False, "torch"))
        assert set(result.values()) == {"SUCCESS"}


def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, ids, gather_ids = linear_inputs(6, 30, 8, 2)
    hidden.requires_grad_()

    def loss(hidden: Tensor) -> Tensor:
        out = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids, temperature=0.7)
        return out.logprobs.sum() + out.gathered.mean()

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), loss(hidden))
    seen = calls(monkeypatch)
    grads = [torch.autograd.grad(f(hidden), hidden)[0] for f in (compiled, loss)]
    assert seen == ["unit_gradient_bwd"] * 2
    torch.testing.assert_close(*grads)


@INTERPRETED
def test_autocast_rounds_both_inputs_in_the_kernels() -> None:
    hidden, weight, ids, gather_ids = linear_inputs(9, 50, 40, 3)
    hidden.requires_grad_()
    results = []
    for backend in ("triton", "torch"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids, backend=backend)
        results.append([out.logprobs, torch.autograd.grad(out.logprobs.sum() + out.gathered.sum(), hidden)[0]])
    assert results[0][1].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
