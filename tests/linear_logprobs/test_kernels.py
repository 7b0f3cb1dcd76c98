"""Triton kernels against float64, in the interpreter and (marked gpu) on a device: values, bits, poison, dead rows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from dppo_kernels import LoraWeight, linear_logprobs
from dppo_kernels._row_stats import Upstream
from dppo_kernels.linear_logprobs import kernels, kernels_bwd
from dppo_kernels.linear_logprobs.projection import Projection
from tests.linear_logprobs.test_op import DIFFERENTIABLE, OUTPUTS, run
from tests.numerics import assert_as_exact_as_torch
from tests.strategies import IGNORE, ScoringCase, scoring_cases

# Kernels are decorated once: for the interpreter where there is no GPU, for the GPU where there is one.
ON_CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU of this machine")
)
DEVICES = [ON_CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
INTERPRETED = settings(max_examples=10)  # an example is about a second
CASE = ScoringCase(
    rows=33, hidden_size=33, vocab=123, n_gather=4, dtype=torch.float32, scale=4.0, layout="contiguous", temperature="per_row",
    ignored="some", bias=True, softcap=5.0, logit_scale=0.25, seed=1,
)  # fmt: skip
# Logits of about a thousand: where p is 1, p - 1 is the difference between two roundings of the same logit, times the head.
COLD = ScoringCase(
    rows=33, hidden_size=8, vocab=2, n_gather=1, dtype=torch.float32, scale=30.0, layout="contiguous", temperature="cold",
    ignored="none", bias=False, softcap=None, logit_scale=1.0, seed=35,
)  # fmt: skip


def run_naive(case: ScoringCase) -> dict[str, Tensor]:
    """Gradients that full logits in the case's own dtype give: what 16-bit training computes without this library."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in case.hidden_and_head()]
    hidden, weight, bias = leaves
    z = case.logit_scale * torch.nn.functional.linear(hidden, weight, bias).float()
    z = z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)
    temperature = case.row_temperature()
    logp = torch.log_softmax(z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature), -1)
    ids, gather_ids = case.ids(), case.gather_ids()
    counted = ids != IGNORE
    g = torch.Generator().manual_seed(case.seed + 1)
    values = {
        "logprobs": logp.gather(1, ids.clamp(min=0)[:, None]).squeeze(1),
        "lse": torch.logsumexp(z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature), -1),
        "entropy": -(logp.exp() * logp).sum(-1),
    }
    values = {name: torch.where(counted, value, 0.0) for name, value in values.items()}
    if gather_ids is not None:
        wanted = (gather_ids >= 0) & counted[:, None]
        values["gathered"] = torch.where(wanted, logp.gather(1, gather_ids.clamp(min=0)), 0.0)
    loss = sum((values[name] * torch.randn(values[name].shape, generator=g)).sum() for name in DIFFERENTIABLE if name in values)
    used = {name: leaf for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True) if leaf is not None}
    return dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@given(case=scoring_cases(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
@example(case=CASE)
@example(case=replace(CASE, dtype=torch.bfloat16, softcap=None, temperature="cold"))
@example(case=COLD)
@example(case=replace(COLD, n_gather=0, rows=2, seed=11))
@INTERPRETED
def test_as_exact_as_torch(device: str, case: ScoringCase) -> None:
    values, grads = run(case, case.dtype, "triton", device)
    exact, exact_grads = run(case, torch.float64, "reference")
    in_torch, torch_grads = run(case, torch.float32, "reference")
    largest = case.largest_logit()
    for name, value in values.items():
        if name == "is_top1":
            clear = (in_torch["is_top1"] == exact["is_top1"]).logical_and(in_torch["logprobs"].exp() > 0.51)
            assert torch.equal(value[clear], exact[name][clear])
        else:
            assert_as_exact_as_torch(name, value, in_torch[name], exact[name], largest=largest)
    if case.dtype != torch.float32:  # gradients of logits are rounded to the inputs' dtype, as autograd rounds them
        torch_grads = run_naive(case)
    for name, grad in grads.items():
        assert_as_exact_as_torch(f"d{name}", grad, torch_grads[name].to(case.dtype), exact_grads[name], largest=largest)


def inputs(device: str, dtype: torch.dtype = torch.bfloat16, rows: int = 40) -> tuple[Projection, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 72, generator=g).to(device, dtype), torch.randn(203, 72, generator=g).to(device, dtype)
    ids, gather_ids = torch.randint(0, 203, (rows,), generator=g), torch.randint(-1, 203, (rows, 5), generator=g)
    ids[::7] = IGNORE
    temperature = torch.rand(rows, generator=g) + 0.5
    return Projection(hidden, weight, None, temperature.to(device), 0.5, None, dtype), ids.to(device), gather_ids.to(device)


def forward(projection: Projection, ids: Tensor, gather_ids: Tensor, **changes) -> dict[str, Tensor]:
    return kernels.linear_logprobs_fwd(
        projection, ids, gather_ids, ignore_index=IGNORE, outputs=frozenset(OUTPUTS), **changes
    )  # fmt: skip


def backward(projection: Projection, ids: Tensor, gather_ids: Tensor, saved: dict[str, Tensor], **changes) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=g).to(ids.device) for x in (ids, ids, ids, gather_ids)]
    for grad in grads:
        grad[::3] = 0
    dhidden, dweight, *_ = kernels_bwd.linear_logprobs_bwd(
        projection, ids, gather_ids, Upstream(*grads), saved, ignore_index=IGNORE, needs=(True, True, False), **changes
    )
    assert dhidden is not None
    assert dweight is not None
    return [dhidden, dweight]


@pytest.mark.parametrize("device", DEVICES)
def test_descriptors_pointers_and_reruns_give_the_same_bits(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this device has no tensor memory accelerator")
    x = inputs(device)
    runs = [forward(*x, descriptors=described) for described in (True, False, True)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
        assert torch.equal(value, runs[2][name]), name
    grads = [backward(*x, runs[0], descriptors=described) for described in (True, False, True)]
    for first, *others in zip(*grads, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_in_any_batch(device: str) -> None:
    projection, ids, gather_ids = inputs(device)
    whole = forward(projection, ids, gather_ids)
    # The interpreter multiplies tiles with BLAS, whose bits depend on the place in the tile: there, rows keep their places.
    order = torch.arange(21) if device == "cpu" else torch.randperm(40, device=device)[:21]
    part = forward(projection.select(order), ids[order], gather_ids[order])
    for name, value in part.items():
        assert torch.equal(value, whole[name][order]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_poisoned_buffers_and_dead_rows_leave_no_trace(device: str, needs: tuple[bool, bool, bool]) -> None:
    """Uninitialised memory is NaN, and so are the hidden states of rows that must not be read."""
    projection, ids, gather_ids = inputs(device, torch.float32)
    projection = replace(projection, bias=torch.randn(203, generator=torch.Generator().manual_seed(5)).to(device))
    clean = forward(projection, ids, gather_ids)
    upstream = torch.randn(40, generator=torch.Generator().manual_seed(6)).to(device)
    upstream[::2] = 0
    arguments = (ids, gather_ids, Upstream(upstream, None, None, None))
    clean_grads = kernels_bwd.linear_logprobs_bwd(projection, *arguments, clean, ignore_index=IGNORE, needs=needs)
    hidden = projection.hidden.clone()
    hidden[ids == IGNORE] = torch.nan
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory
    try:
        assert torch.zeros(1).new_empty(3).isnan().all()
        poisoned = forward(replace(projection, hidden=hidden), ids, gather_ids)
        hidden[::2] = torch.nan
        grads = kernels_bwd.linear_logprobs_bwd(
            replace(projection, hidden=hidden), *arguments, clean, ignore_index=IGNORE, needs=needs
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name
    assert [grad is not None for grad in grads[:3]] == list(needs)
    for grad, expected in zip(grads, clean_grads, strict=True):
        assert grad is None or torch.equal(grad, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_descriptors_that_cannot_be_are_refused(device: str) -> None:
    projection, ids, gather_ids = inputs(device)
    transposed = replace(projection, weight=projection.weight.t().contiguous().t())
    with pytest.raises(ValueError, match="tensor descriptors are not possible: rows are not contiguous"):
        forward(transposed, ids, gather_ids, descriptors=True)
    torch.testing.assert_close(forward(transposed, ids, gather_ids), forward(projection, ids, gather_ids))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "vocab", "hidden_size"), [(0, 5, 4), (1, 2, 1), (3, 33, 507), (52, 307, 123)])
def test_breaking_shapes(device: str, n: int, vocab: int, hidden_size: int) -> None:
    hidden, weight = torch.randn(n, hidden_size, device=device), torch.randn(vocab, hidden_size, device=device)
    ids = torch.full((n,), vocab - 1, device=device)

    def results(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        out = linear_logprobs(*leaves, ids, outputs=("logprobs", "entropy"), temperature=0.1, backend=backend)
        grads = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves)
        return [x.cpu() for x in (out.logprobs, out.entropy, *grads)]

    ours, in_torch = results(torch.float32, "triton"), results(torch.float32, "reference")
    largest = 10 * (hidden @ weight.t()).abs().max().item() if n else 1.0
    exact = results(torch.float64, "reference")
    for name, *values in zip(("logprobs", "entropy", "dhidden", "dweight"), ours, in_torch, exact, strict=True):
        assert_as_exact_as_torch(name, *values, largest=largest)


@pytest.mark.parametrize("device", DEVICES)
def test_all_logits_far_below_zero(device: str) -> None:
    """Where zeros of a masked column would be the largest logit."""
    projection, ids, gather_ids = inputs(device, torch.float32)
    plain = forward(projection, ids, gather_ids)
    low = forward(replace(projection, bias=torch.full((203,), -400.0, device=device)), ids, gather_ids)
    shift = 0.5 * 400 / projection.temperature  # logit scale / temperature
    counted = ids != IGNORE
    torch.testing.assert_close(low["lse"][counted], (plain["lse"] - shift)[counted], rtol=1e-6, atol=1e-4)
    for name in ("logprobs", "entropy", "gathered"):
        torch.testing.assert_close(low[name], plain[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", ["trained", "LoRA", "frozen", "frozen, entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_certain_token_has_exactly_no_gradient(device: str, dtype: torch.dtype, head: str) -> None:
    """All others underflow: its log-prob is 0, sampled or gathered, and so is the gradient, in whatever order products sum."""
    g = torch.Generator().manual_seed(0)
    weight, certain = 3 * torch.randn(40, 33, generator=g), torch.arange(0, 40, 4, device=device)
    hidden, a, b = weight[::4], torch.randn(5, 33, generator=g) / 30, torch.randn(40, 5, generator=g) / 30
    hidden, weight, a, b = leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight, a, b)]
    out = linear_logprobs(
        hidden,
        LoraWeight(weight, a, b) if head == "LoRA" else weight if head == "trained" else weight.detach(),
        torch.cat([certain[:5], certain[5:] + 1]),  # the last five sample an impossible token
        gather_ids=certain[:, None],
        temperature=0.1,
        outputs=("logprobs", "entropy"),
        backend="triton",
    )
    values = [out.logprobs[:5], out.gathered, *([] if head == "frozen" else [out.entropy])]
    assert not any(value.any() for value in values)
    for grad in torch.autograd.grad(sum(value.sum() for value in values), leaves, allow_unused=True):
        assert grad is None or not grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_rounds_both_inputs(device: str) -> None:
    leaves = [torch.randn(n, 40, device=device, requires_grad=True) for n in (9, 50)]
    ids = torch.arange(9, device=device)
    results = []
    for backend in ("triton", "reference"):
        with torch.autocast(device, dtype=torch.bfloat16):
            logprobs = linear_logprobs(*leaves, ids, backend=backend).logprobs
        results.append([logprobs, *torch.autograd.grad(logprobs.sum(), leaves)])
    assert [x.dtype for x in results[0]] == [torch.float32] * 3
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-4)
    for ours, reference in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2)  # dlogits are rounded to bfloat16 on a device


@pytest.mark.parametrize("device", DEVICES)
def test_impossible_tokens(device: str) -> None:
    projection, ids, gather_ids = inputs(device, torch.float32)
    bias = torch.zeros(203, device=device)
    bias[64:96] = -torch.inf  # a whole tile in the interpreter
    out = forward(replace(projection, bias=bias), ids, gather_ids)
    counted = ids != IGNORE
    impossible = (ids >= 64) & (ids < 96)
    assert torch.equal(out["logprobs"] == -torch.inf, impossible & counted)
    assert out["entropy"].isfinite().all()
    assert all(grad.isfinite().all() for grad in backward(replace(projection, bias=bias), ids, gather_ids, out))


@pytest.mark.gpu
def test_one_op_under_compile_and_autocast_on_the_device() -> None:
    hidden, weight = (torch.randn(n, 64, device="cuda", requires_grad=True) for n in (40, 300))
    ids = torch.randint(0, 300, (40,), device="cuda")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"))
        return out.logprobs.sum() + out.entropy.square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(hidden, weight), loss(hidden, weight))
    grads = [torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (compiled, loss)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current() -> None:
    projection, ids, gather_ids = inputs("cuda:1")
    expected = forward(*inputs("cuda:0"))
    for name, value in forward(projection, ids, gather_ids).items():
        assert value.device == torch.device("cuda:1")
        assert torch.equal(value.cpu(), expected[name].cpu())


@pytest.mark.gpu
def test_large_shapes_on_the_device() -> None:
    """bf16 inputs, fp32 statistics: within 1e-4 of float64 of the same inputs; more than 2^31 logits never exist."""
    for n, vocab, width in ((16384, 151936, 256), (70000, 32000, 128), (252, 507, 123), (65, 129920, 1024)):
        hidden = torch.randn(n, width, device="cuda").bfloat16()
        weight = (torch.randn(vocab, width, device="cuda") * 4 / width**0.5).bfloat16()
        ids = torch.randint(0, vocab, (n,), device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"), backend="triton")
        assert torch.cuda.max_memory_allocated() - before < 0.2 * n * vocab * 2 + 2**26
        rows = torch.randperm(n, device="cuda")[:64]
        logp = torch.log_softmax(hidden[rows].double() @ weight.double().t(), -1)
        exact = logp.gather(1, ids[rows, None]).squeeze(1)
        assert (out.logprobs[rows].double() - exact).abs().max() < 1e-4
        assert (out.entropy[rows].double() + (logp.exp() * logp).sum(-1)).abs().max() < 1e-4
