"""A LoRA lm_head against the materialised sum: values, all gradients, work and memory, in every implementation."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import PRESETS, LoraWeight, explain_linear_logprobs, linear_logprobs, linear_policy_loss
from dppo_kernels._row_stats import Upstream
from dppo_kernels.linear_logprobs import torch_impl
from dppo_kernels.linear_logprobs.projection import Projection
from tests.census import GemmFlops, LargestTensor, counted_kernels, linear_inputs
from tests.linear_policy_loss.cases import PolicyCase
from tests.numerics import assert_as_exact_as_torch
from tests.strategies import IGNORE, ScoringCase, scoring_cases

SCALE = 0.75
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU of this machine")
BACKENDS = ["reference", "torch", pytest.param("triton", marks=INTERPRETED)]
NAMES = ("hidden", "base", "a", "b", "bias")
CASE = ScoringCase(
    rows=33, hidden_size=33, vocab=123, n_gather=4, dtype=torch.float32, scale=4.0, layout="strided", temperature="per_row",
    ignored="some", bias=True, softcap=5.0, logit_scale=0.25, seed=1,
)  # fmt: skip

# Logits of about a thousand over two tokens: the kernels' dot products for picked ids round otherwise than their tiles.
COLD = ScoringCase(
    rows=33, hidden_size=8, vocab=2, n_gather=4, dtype=torch.float32, scale=30.0, layout="contiguous", temperature="cold",
    ignored="none", bias=False, softcap=None, logit_scale=1.0, seed=512,
)  # fmt: skip

# Torch's backward projects the rows again whose logits it did not keep: in the tiles of the forward, or it rounds otherwise.
STEEP = replace(COLD, vocab=100, n_gather=0, ignored="some", seed=5)


def factors(vocab: int, width: int, rank: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, width, generator=g) / width**0.5, torch.randn(vocab, rank, generator=g) * scale / rank**0.5
    return a.to(dtype), b.to(dtype)


def head(base: Tensor, a: Tensor, b: Tensor, *, summed: bool) -> Tensor | LoraWeight:
    return base + SCALE * b @ a if summed else LoraWeight(base, a, b, SCALE)


def run(
    case: ScoringCase, rank: int, dtype: torch.dtype, backend: str, *, summed: bool = False, device: str = "cpu", **options
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of a loss through all of them, with inputs rounded to the case's dtype, then cast to `dtype`."""
    hidden, base, bias = case.hidden_and_head()
    a, b = factors(case.vocab, case.hidden_size, rank, case.scale, case.dtype)
    leaves = {
        name: x.to(device, dtype).requires_grad_()
        for name, x in zip(NAMES, (hidden, base, a, b, bias), strict=True)
        if x is not None
    }
    gather_ids, temperature = (
        x.to(device) if isinstance(x, Tensor) else x for x in (case.gather_ids(), case.row_temperature())
    )
    out = linear_logprobs(
        leaves["hidden"],
        head(leaves["base"], leaves["a"], leaves["b"], summed=summed),
        case.ids().to(device),
        bias=leaves.get("bias"),
        gather_ids=gather_ids,
        temperature=temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        outputs=("logprobs", "lse", "entropy"),
        backend=backend,
        **options,
    )
    values = {name: value.cpu() for name, value in out._asdict().items() if value is not None}
    g = torch.Generator().manual_seed(case.seed + 1)
    loss = sum((value * torch.randn(value.shape, generator=g)).sum() for value in values.values())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return values, {name: grad.cpu() for name, grad in zip(leaves, grads, strict=True)}


def hold_to_the_sum(case: ScoringCase, rank: int, backend: str, **options) -> None:
    values, grads = run(case, rank, case.dtype, backend, **options)
    exact, exact_grads = run(case, rank, torch.float64, "reference", summed=True)
    in_torch, torch_grads = run(case, rank, case.dtype, "reference", summed=True)  # the sum is rounded, as it would be
    # A loss through logits of twice the head's own, and products of rank and width in between.
    largest = 4 * max(case.largest_logit(), 1.0) * case.hidden_size**0.5
    for name, value in values.items():
        assert_as_exact_as_torch(name, value, in_torch[name], exact[name], largest=largest)
    for name, grad in grads.items():
        assert_as_exact_as_torch(f"d{name}", grad, torch_grads[name], exact_grads[name], largest=largest)


@pytest.mark.parametrize("workspace", [None, 7 * 100 * 8])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@given(case=scoring_cases(dtypes=(torch.float32, torch.float64)), rank=st.sampled_from([1, 5, 40]))
@example(case=CASE, rank=5)
@example(case=STEEP, rank=5)
@settings(max_examples=15)
def test_equals_the_sum(backend: str, workspace: int | None, case: ScoringCase, rank: int) -> None:
    hold_to_the_sum(case, rank, backend, workspace_bytes=workspace)


@INTERPRETED
@given(case=scoring_cases(), rank=st.sampled_from([1, 5, 40]))
@example(case=CASE, rank=40)
@example(case=COLD, rank=40)
@settings(max_examples=5)
def test_kernels_equal_the_sum(case: ScoringCase, rank: int) -> None:
    hold_to_the_sum(case, rank, "triton")


@pytest.mark.gpu
@given(case=scoring_cases(), rank=st.sampled_from([1, 5, 16, 40]))
@example(case=CASE, rank=40)
def test_kernels_equal_the_sum_on_the_device(case: ScoringCase, rank: int) -> None:
    hold_to_the_sum(case, rank, "triton", device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_heads_are_as_exact_as_separate_layers(backend: str) -> None:
    """What torch computes in bfloat16 where base and update are layers of their own, as PEFT has them."""
    case = replace(CASE, dtype=torch.bfloat16, softcap=None, logit_scale=1.0, temperature="one", ignored="none", n_gather=0)
    values, grads = run(case, 5, torch.bfloat16, backend)
    exact, exact_grads = run(case, 5, torch.float64, "reference", summed=True)
    g = torch.Generator().manual_seed(case.seed + 1)
    hidden, base, bias = case.hidden_and_head()
    leaves = [
        x.clone().requires_grad_() for x in (hidden, base, *factors(case.vocab, case.hidden_size, 5, 4.0, case.dtype), bias)
    ]
    h, w, a, b, c = leaves
    z = (torch.nn.functional.linear(h, w, c) + (h @ a.t()) @ b.t() * SCALE).float()
    logp = torch.log_softmax(z, -1)
    theirs = {
        "logprobs": logp.gather(1, case.ids()[:, None]).squeeze(1),
        "entropy": -(logp.exp() * logp).sum(1),
        "lse": torch.logsumexp(z, -1),
    }
    loss = sum((theirs[name] * torch.randn(theirs[name].shape, generator=g)).sum() for name in values)
    their_grads = dict(zip(NAMES, torch.autograd.grad(loss, leaves), strict=True))
    for ours, others, truth in ((values, theirs, exact), (grads, their_grads, exact_grads)):
        for name, value in ours.items():
            assert_as_exact_as_torch(name, value, others[name], truth[name], largest=case.largest_logit())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("preset", "changes", "workspace"),
    [
        ("dapo", {}, 16 * 53 * 4),  # sixteen rows at a time
        ("gspo", {}, 16 * 53 * 4),
        ("gspo", {"entropy_coef": 0.1}, None),
        ("dppo_topk_kl", {"beta": 0.1}, 0),
    ],
)
def test_the_fused_loss_equals_that_of_the_sum(backend: str, preset: str, changes: dict, workspace: int | None) -> None:
    case = PolicyCase(
        preset, b=4, t=11, masked="none", changes=tuple(changes.items()), bias=True, softcap=8.0, temperature="per_row"
    )
    a, b = factors(case.vocab, case.hidden_size, 5, case.scale, case.dtype)
    hidden, base, bias = case.leaves()
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, base, a, b, bias)]
        weight = head(*leaves[1:4], summed=dtype == torch.float64)
        options = {"backend": name, "bias": leaves[4], "workspace_bytes": workspace}
        loss, _ = linear_policy_loss(leaves[0], weight, **case.arguments(), **options)
        results.append([loss.double(), *(x.double() for x in torch.autograd.grad(loss, leaves))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=2e-6 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [("a", "b"), ("b",), ("hidden", "a"), ("hidden", "base")])
def test_any_subset_may_be_frozen(backend: str, trained: tuple[str, ...]) -> None:
    hidden, base, ids, gather_ids = linear_inputs(9, 40, 8, 3)
    a, b = factors(40, 8, 3, 1.0, torch.float32)
    results = []
    for name, summed in ((backend, False), ("reference", True)):
        leaves = {k: x.clone().requires_grad_(k in trained) for k, x in zip(NAMES[:4], (hidden, base, a, b), strict=True)}
        weight = head(leaves["base"], leaves["a"], leaves["b"], summed=summed)
        linear_logprobs(leaves["hidden"], weight, ids, gather_ids=gather_ids, backend=name).logprobs.sum().backward()
        assert [k for k, x in leaves.items() if x.grad is not None] == [k for k in NAMES if k in trained]
        results.append([x.grad for x in leaves.values() if x.grad is not None])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_behind_the_mask_reaches_no_gradient(backend: str) -> None:
    hidden, base, ids, _ = linear_inputs(9, 40, 8, 3)
    a, b = factors(40, 8, 3, 1.0, torch.float32)
    mask = torch.arange(9) % 3 > 0
    spec, batch = PRESETS["dapo"], (torch.full((9,), -3.0), torch.ones(9), mask)
    hidden[~mask] = torch.nan
    for scored in (True, False):
        leaves = [x.clone().requires_grad_() for x in (a, b)]
        weight = LoraWeight(base, *leaves, SCALE)
        if scored and backend == "reference":
            continue  # it computes all rows
        if scored:
            loss = linear_logprobs(hidden, weight, ids.masked_fill(~mask, IGNORE), backend=backend).logprobs.sum()
        else:
            loss, _ = linear_policy_loss(hidden, weight, ids, *batch, spec=spec, backend=backend)
        grads = torch.autograd.grad(loss, leaves)
        assert all(grad.isfinite().all() and grad.any() for grad in grads)


N, V, H, RANK = 40, 403, 48, 3


def lora_projection() -> tuple[Projection, Tensor, Tensor]:
    hidden, weight, ids, gather_ids = linear_inputs(N, V, H, 5)
    a, b = factors(V, H, RANK, 1.0, torch.float32)
    return Projection(hidden, weight, None, 1.0, 1.0, None, torch.float32, (hidden @ a.t() * SCALE, b)), ids, gather_ids


@pytest.mark.parametrize("base_trained", [False, True])
def test_flops(base_trained: bool) -> None:
    """Every product of N H V has one of N r V beside it; a frozen base spares its own."""
    x, ids, gather_ids = lora_projection()
    with GemmFlops() as forward:
        saved = torch_impl.linear_logprobs_fwd(x, ids, gather_ids, ignore_index=IGNORE, outputs=frozenset(["logprobs"]))
    assert forward.flops == 2 * N * (H + RANK) * V
    upstream = Upstream(torch.ones(N), None, None, None)
    needs = (True, base_trained, False, True, True)
    with GemmFlops() as backward:
        torch_impl.linear_logprobs_bwd(x, ids, gather_ids, upstream, saved, ignore_index=IGNORE, needs=needs)
    assert backward.flops == 2 * N * V * ((H + RANK) + (H + RANK) + (H * base_trained + RANK))


@INTERPRETED
def test_elements_moved_by_the_kernels() -> None:
    """The factor b is read wherever the head is, and once more for its own product with dL/dz."""
    from dppo_kernels.linear_logprobs import kernels, kernels_bwd

    x, ids, _ = lora_projection()
    blocks, picked = -(-N // 16), N
    with counted_kernels(head=x.weight, b=x.low_rank[1]) as forward:
        saved = kernels.linear_logprobs_fwd(x, ids, None, ignore_index=IGNORE, outputs=frozenset(["logprobs"]))
    assert forward.loaded == {"head": (blocks * V + picked) * H, "b": (blocks * V + picked) * RANK}
    upstream, needs = Upstream(torch.ones(N), None, None, None), (False, False, False, True, True)
    with counted_kernels(head=x.weight, b=x.low_rank[1]) as backward:
        kernels_bwd.linear_logprobs_bwd(x, ids, None, upstream, saved, ignore_index=IGNORE, needs=needs)
    assert backward.loaded == {"head": (blocks * V + picked) * H, "b": (2 * blocks * V + picked) * RANK}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.parametrize("fused", [False, True])
def test_nothing_of_the_size_of_the_head_is_made(backend: str, fused: bool) -> None:
    from dppo_kernels.linear_logprobs import op
    from dppo_kernels.linear_policy_loss import op as policy

    hidden, base, ids, _ = linear_inputs(16, V, H, 3)
    a, b = factors(V, H, RANK, 1.0, torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, a, b)]
    weight = LoraWeight(base, *leaves[1:], SCALE)
    largest, seen = LargestTensor(base), 0

    def counted(function):
        def call(*args, **kwargs):  # inside the op: a dispatch mode sees nothing through it
            nonlocal seen
            seen += 1
            with largest:
                return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        real = op.implementation(backend)
        patch.setattr(op, "implementation", lambda name: tuple(counted(f) for f in real))
        patch.setattr(policy, "_run", counted(policy._run))
        if fused:
            arguments = (torch.full((16,), -3.0), torch.ones(16), torch.ones(16, dtype=torch.bool))
            loss, _ = linear_policy_loss(leaves[0], weight, ids, *arguments, spec=PRESETS["dapo"], backend=backend)
        else:
            loss = linear_logprobs(leaves[0], weight, ids, backend=backend).logprobs.sum()
        torch.autograd.grad(loss, leaves)
    assert seen == (1 if fused else 2)
    assert largest.nbytes < base.nbytes / 2


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=INTERPRETED)])
def test_autocast_rounds_all_factors(backend: str) -> None:
    hidden, base, ids, _ = linear_inputs(9, 40, 8, 3)
    base = base.bfloat16()
    a, b = factors(40, 8, 3, 1.0, torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, a, b)]
    results = []
    for name in (backend, "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs = linear_logprobs(leaves[0], LoraWeight(base, *leaves[1:]), ids, backend=name).logprobs
        results.append([logprobs, *torch.autograd.grad(logprobs.sum(), leaves)])
    assert [x.dtype for x in results[0]] == [torch.float32] * 4
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=2e-2, atol=2e-2)


def test_compiled_equals_eager() -> None:
    hidden, base, ids, gather_ids = linear_inputs(6, 30, 8, 2)
    a, b = factors(30, 8, 3, 1.0, torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, a, b)]

    def loss(hidden: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weight = LoraWeight(base, a, b, SCALE)
        scores = linear_logprobs(hidden, weight, ids, gather_ids=gather_ids, workspace_bytes=10 * 30 * 4)
        batch = (torch.full((6,), -3.0), torch.ones(6), torch.ones(6, dtype=torch.bool))
        return scores.gathered.sum() + linear_policy_loss(hidden, weight, ids, *batch, spec=PRESETS["dapo"])[0]

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    grads = [torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)]
    torch.testing.assert_close(*grads)


def test_explained() -> None:
    frozen = {"vocab": 1000, "needs_gradient": (True, False, False)}
    assert "U = P W" in explain_linear_logprobs(**frozen)
    assert "the head is trained" in explain_linear_logprobs(**frozen, lora=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": [1.0]}, TypeError, "`weight.a` must be a torch.Tensor, got list"),
        ({"b": torch.zeros(11, 2, dtype=torch.long)}, TypeError, "`weight.b` must have a floating-point dtype"),
        (
            {"a": torch.zeros(2, 7)},
            ValueError,
            r"`weight.a` must have shape \[r, H of `weight.base`\] = \[2, 8\], got \[2, 7\]",
        ),
        ({"a": torch.zeros(8)}, ValueError, r"`weight.a` must have shape .*got \[8\]"),
        ({"b": torch.zeros(11, 3)}, ValueError, r"`weight.b` must have shape .* = \[11, 2\], got \[11, 3\]"),
        ({"a": torch.zeros(0, 8), "b": torch.zeros(11, 0)}, ValueError, "`weight.a` must have at least one row"),
        ({"a": torch.zeros(2, 8).bfloat16()}, TypeError, "`hidden` is torch.float32 and `weight.a` is torch.bfloat16"),
        ({"b": torch.zeros(11, 2, device="meta")}, ValueError, "`weight.b` is on meta, but `hidden` is on cpu"),
        ({"scale": "1"}, TypeError, "`weight.scale` must be a number, got str"),
        ({"base": torch.zeros(8)}, ValueError, r"`weight` must be \[V, H\]"),
        ({"base": torch.zeros(11, 8).bfloat16()}, TypeError, "`hidden` is torch.float32 and `weight` is torch.bfloat16"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    weight = LoraWeight(**{"base": torch.zeros(11, 8), "a": torch.zeros(2, 8), "b": torch.zeros(11, 2), **changes})
    with pytest.raises(error, match=message):
        linear_logprobs(torch.zeros(4, 8), weight, torch.zeros(4, dtype=torch.long))
