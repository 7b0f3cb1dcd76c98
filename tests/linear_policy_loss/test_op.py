"""The fused policy loss against its definition, ``policy_loss(linear_logprobs(...))``: every preset, dtype, mask and design."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dppo_kernels import PRESETS, explain_linear_policy_loss, linear_policy_loss
from dppo_kernels.linear_policy_loss import op
from tests.linear_policy_loss.cases import VARIANTS, PolicyCase, policy_cases, run, with_options
from tests.numerics import assert_as_exact_as_torch, bit_equal

HALF = (torch.bfloat16, torch.float16)
# No chunk at all (tiles, recomputed); sixteen rows; everything.
WORKSPACES = (0, 16 * 123 * 8, 1 << 20)


def hold_to_reference(case: PolicyCase, backend: str, device: str = "cpu") -> None:
    values, grads, rest = run(case, case.dtype, backend, device)
    exact, exact_grads, exact_rest = run(case, torch.float64, "reference")
    upcast = torch.float64 if case.dtype == torch.float64 else torch.float32
    in_torch, torch_grads, _ = run(case, upcast, "reference")
    # A loss and its gradient are products with ratios and advantages: relative to their size, and to that of the logits.
    largest = max(1.0, case.scale * 5) / {"cold": 0.3, "per_row": 0.5, "one": 1.0}[case.temperature]
    assert_as_exact_as_torch("loss", values["loss"], in_torch["loss"], exact["loss"], largest=largest)
    for name, grad in grads.items():
        torch_grad = torch_grads[name].to(case.dtype)
        assert_as_exact_as_torch(f"d{name}", grad, torch_grad, exact_grads[name], largest=largest)
    aux, stats = rest["aux"], rest["stats"]
    scored = aux.scored.cpu()
    logprobs = exact_rest["aux"].logprobs
    assert (aux.logprobs.cpu() - logprobs)[scored].abs().max() < 1e-5 * largest if scored.any() else True
    assert not aux.logprobs.cpu()[~scored].any()
    assert stats["ratio"][1] == scored.sum()
    assert stats["unscored"][:2] == ((case.arguments()["loss_mask"] & ~scored).sum(), case.arguments()["loss_mask"].sum())


@pytest.mark.parametrize("workspace", WORKSPACES)
@given(case=policy_cases(dtypes=(torch.float32, torch.float64, *HALF)))
@example(case=PolicyCase("gspo", b=3, t=11, softcap=5.0, bias=True, changes=VARIANTS[3], temperature="per_row"))
@example(case=PolicyCase("dppo_topk_kl", dtype=torch.bfloat16, scale=30.0, temperature="cold"))
@example(case=PolicyCase("grpo", advantages="token", changes=VARIANTS[2], weighted=True, layout="strided"))
def test_as_exact_as_torch(workspace: int, case: PolicyCase) -> None:
    hold_to_reference(with_options(case, workspace_bytes=workspace), "torch")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_statistics_are_those_of_the_unfused_loss(preset: str, variant: tuple) -> None:
    case = PolicyCase(preset, b=4, t=9, dtype=torch.float64, changes=variant)
    options = {"score_inactive": True, "with_entropy": True}
    _, _, ours = run(with_options(case, **options), torch.float64, "torch")
    _, _, theirs = run(with_options(case, with_entropy=True), torch.float64, "reference")
    assert list(ours["stats"]) == list(theirs["stats"])
    for name, stat in theirs["stats"].items():
        for a, b in zip(ours["stats"][name], stat, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["aux"].entropy * theirs["aux"].scored, theirs["aux"].entropy * theirs["aux"].scored)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_scoring_inactive_tokens_changes_statistics_only(preset: str, variant: tuple) -> None:
    case = PolicyCase(preset, b=4, t=9, advantages="half", dtype=torch.float64, changes=variant)
    (loss, grads, few), (loss_all, grads_all, everything) = (
        run(with_options(case, score_inactive=score), torch.float64, "torch") for score in (False, True)
    )
    torch.testing.assert_close(loss, loss_all)
    torch.testing.assert_close(grads, grads_all)
    mask = case.arguments()["loss_mask"]
    assert torch.equal(everything["aux"].scored, mask)
    skipped = mask & (case.arguments()["advantages"] == 0)[:, None]
    assert torch.equal(few["aux"].scored, mask if variant else mask & ~skipped)
    assert everything["stats"]["unscored"][0] == 0
    assert few["stats"]["unscored"][0] == (0 if variant else skipped.sum())


@pytest.mark.parametrize("preset", PRESETS)
def test_nan_behind_the_mask_changes_nothing(preset: str) -> None:
    case = PolicyCase(preset, b=4, t=9, changes=(("beta", 0.1), ("entropy_coef", 0.1)), bias=True)
    hidden, weight, bias = case.leaves()
    results = []
    for poison in (0.0, torch.nan):
        x = torch.where(case.arguments()["loss_mask"][..., None], hidden, poison).requires_grad_()
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        loss, stats = linear_policy_loss(x, w, **case.arguments(), bias=b)
        results.append((loss, *torch.autograd.grad(loss, (x, w, b)), *(y for stat in stats.values() for y in stat)))
    for clean, poisoned in zip(*results, strict=True):
        assert bit_equal(clean, poisoned)
    assert not torch.stack([x.isnan().any() for x in results[1]]).any()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("how", [{"masked": "all"}, {"advantages": "none"}])
def test_no_active_token_gives_exact_zeros(preset: str, how: dict[str, str]) -> None:
    values, grads, rest = run(PolicyCase(preset, bias=True, **how), torch.float32, "torch")
    assert values["loss"] == 0
    assert not any(grad.any() for grad in grads.values())
    assert rest["stats"]["ratio"][1] == 0


def test_no_tokens_at_all() -> None:
    hidden, weight = torch.randn(0, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    nothing = torch.zeros(0)
    loss, _ = linear_policy_loss(
        hidden, weight, torch.zeros(0, dtype=torch.long), nothing, nothing, nothing.bool(), spec=PRESETS["ppo"]
    )
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()


@given(SEEDS := st.integers(0, 2**20), st.sampled_from(sorted(PRESETS)))
def test_micro_batches_with_global_normalisers_add_up(seed: int, preset: str) -> None:
    case = PolicyCase(preset, b=3, seed=seed, dtype=torch.float64, changes=(("entropy_coef", 0.1),))
    arguments = case.arguments()
    total = int(arguments["loss_mask"].sum().clamp(min=1))
    per_call = {"token_mean": total, "sequence_mean": 3, "fixed_length": 3 * arguments["max_length"]}
    normalisers = {"denominator": per_call[case.spec().reduction], "entropy_denominator": total}
    leaves = [x.double().requires_grad_() for x in case.leaves() if x is not None]
    whole, _ = linear_policy_loss(*leaves, **arguments)
    expected = torch.autograd.grad(whole, leaves)
    summed = [torch.zeros_like(x) for x in leaves]
    loss = torch.zeros_like(whole)
    for row in range(3):
        part = {
            k: x[row : row + 1] if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == 3 else x
            for k, x in arguments.items()
        }
        micro, _ = linear_policy_loss(leaves[0][row : row + 1], leaves[1], **part, **normalisers)
        loss += micro
        for total_grad, grad in zip(summed, torch.autograd.grad(micro, leaves), strict=True):
            total_grad += grad
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(summed, list(expected))


def test_an_improbable_token_is_scaled_by_the_largest_logit() -> None:
    """exp(z - z_target) would overflow: a log-prob of -300, of one row in a chunk."""
    weight = torch.zeros(5, 2)
    weight[:, 0] = torch.tensor([0.0, 300.0, 299.0, 1.0, 2.0])
    hidden = torch.tensor([[1.0, 0.3], [0.01, 0.2]])
    results = []
    for dtype, backend in ((torch.float32, "torch"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        x = (torch.tensor([0, 1]), torch.tensor([-299.5, -1.0]), torch.tensor([1.0, -1.0]), torch.tensor([True, True]))
        loss, stats = linear_policy_loss(*leaves, *x, spec=PRESETS["ppo"], backend=backend)
        results.append([y.double() for y in (loss.detach(), *torch.autograd.grad(loss, leaves), stats["anchor_kl"].sum)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert results[0][1].abs().max() > 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_exponentials_that_underflow_under_a_soft_cap_have_no_gradient(backend: str) -> None:
    """Logits between -120 and 120: where e is 0, the tanh it was made of cannot be read back from it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    case = PolicyCase("dapo", scale=300.0, softcap=30.0, temperature="cold", changes=VARIANTS[3], masked="none")
    loss, grads, _ = run(case, torch.float32, backend)
    exact, exact_grads, _ = run(case, torch.float64, "reference")
    torch.testing.assert_close(loss["loss"].double(), exact["loss"], rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), exact_grads[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_entropy_keeps_its_digits_where_the_policy_is_sure(backend: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    g = torch.Generator().manual_seed(0)
    hidden, weight = 10 * torch.randn(32, 64, generator=g), torch.randn(200, 64, generator=g)
    logits = hidden.double() @ weight.double().t()
    logp = torch.log_softmax(logits, -1)
    _, _, aux = linear_policy_loss(
        hidden,
        weight,
        logits.argmax(-1),
        None,
        torch.ones(32),
        torch.ones(32, dtype=torch.bool),
        spec=PRESETS["ppo"],
        with_entropy=True,
        return_aux=True,
        backend=backend,
    )
    entropy = -(logp.exp() * logp).sum(-1)
    assert (aux.entropy - entropy).abs().max() < 2e-5


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_negative_id_is_padding_without_a_validity_mask(backend: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    case = PolicyCase("dppo_topk_tv", masked="none")
    arguments = case.arguments()
    ids = arguments["rollout_topk_ids"]
    ids[:, :, -1] = -1
    hidden, weight, _ = case.leaves()
    stats = []
    for valid in (None, ids >= 0):
        arguments["topk_valid"] = valid
        stats.append(linear_policy_loss(hidden, weight, **arguments, backend=backend)[1]["divergence"])
    assert torch.equal(stats[0].sum, stats[1].sum)


@pytest.mark.parametrize("preset", ["gspo", "dapo"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 4)])
def test_sequences_without_tokens(preset: str, shape: tuple[int, int]) -> None:
    hidden, weight = torch.randn(*shape, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    nothing = torch.zeros(shape)
    loss, _ = linear_policy_loss(
        hidden, weight, nothing.long(), nothing, torch.zeros(shape[0]), nothing.bool(), spec=PRESETS[preset]
    )
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()


def test_normalisers_may_be_tensors_of_one_number() -> None:
    case = PolicyCase("dapo", changes=VARIANTS[3])
    losses = []
    for number in (10.0, torch.tensor(10.0), torch.tensor([10.0])):
        values, _, _ = run(case, torch.float32, "torch", denominator=number, entropy_denominator=number)
        losses.append(values["loss"])
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_frozen_inputs(trained: tuple[str, ...], workspace: int) -> None:
    case = PolicyCase("dapo", bias=True)
    leaves = dict(zip(("hidden", "weight", "bias"), case.leaves(), strict=True))
    _, everything, _ = run(case, torch.float32, "torch")
    for name in trained:
        leaves[name].requires_grad_()
    hidden, weight, bias = leaves.values()
    loss, _ = linear_policy_loss(hidden, weight, **case.arguments(), bias=bias, workspace_bytes=workspace)
    assert loss.requires_grad == bool(trained)
    if trained:
        for name, grad in zip(trained, torch.autograd.grad(loss, [leaves[name] for name in trained]), strict=True):
            torch.testing.assert_close(grad, everything[name])


def test_the_gradient_is_scaled_by_what_arrives() -> None:
    case = PolicyCase("dppo_binary_tv")
    _, once, _ = run(case, torch.float32, "torch")
    _, scaled, _ = run(case, torch.float32, "torch", upstream=-2.5)
    for name, grad in once.items():
        torch.testing.assert_close(scaled[name], -2.5 * grad)


def test_backward_hands_the_gradient_over_once() -> None:
    case = PolicyCase("ppo")
    hidden, weight, _ = (None if x is None else x.requires_grad_() for x in case.leaves())
    loss, _ = linear_policy_loss(hidden, weight, **case.arguments())
    loss.backward(retain_graph=True)
    kept = hidden.grad.clone()
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()
    assert torch.equal(hidden.grad, kept)


def test_it_has_no_second_derivative() -> None:
    case = PolicyCase("ppo")
    hidden, weight, _ = (None if x is None else x.requires_grad_() for x in case.leaves())
    loss, _ = linear_policy_loss(hidden, weight, **case.arguments())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_under_autocast_products_round_as_in_linear_logprobs() -> None:
    case = PolicyCase("dapo", dtype=torch.float32)
    hidden, weight, _ = (None if x is None else x.requires_grad_() for x in case.leaves())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_policy_loss(hidden, weight, **case.arguments())
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected, _ = linear_policy_loss(*rounded, **case.arguments())
    assert torch.equal(loss, expected)
    assert torch.equal(grads[0].bfloat16(), torch.autograd.grad(expected, rounded)[0])


def test_compiled_equals_eager() -> None:
    case = PolicyCase("dppo_topk_tv", bias=True)
    arguments = case.arguments()

    def step(hidden, weight, bias):
        loss, stats = linear_policy_loss(hidden * 2, weight, **arguments, bias=bias)
        return loss * 3 + stats["ratio"].mean.detach() * 0, stats["masked"].sum

    outs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in case.leaves()]
        loss, masked = function(*leaves)
        outs.append((loss.detach(), masked, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*outs)


def test_opcheck() -> None:
    case = PolicyCase("dapo", b=2, t=3, vocab=11, hidden_size=4)
    hidden, weight, _ = (None if x is None else x.requires_grad_() for x in case.leaves())
    seen = {}

    def record(*args):
        seen["args"] = args
        return real(*args)

    real = torch.ops.dppo_kernels.linear_policy_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.dppo_kernels, "linear_policy_loss", record)
        linear_policy_loss(hidden, weight, **case.arguments())
    torch.library.opcheck(op._op, seen["args"], test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


BASE = PolicyCase("dppo_topk_tv", b=2, t=3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": torch.zeros(2, 4, dtype=torch.long)}, ValueError, "`hidden` must have shape"),
        ({"ids": torch.zeros(2, 3)}, TypeError, "`ids` must hold token ids"),
        ({"anchor_logprobs": torch.zeros(6)}, ValueError, "`anchor_logprobs` must have shape"),
        ({"advantages": torch.zeros(3)}, ValueError, "`advantages` must have shape"),
        ({"loss_mask": torch.ones(2, 3)}, TypeError, "`loss_mask` must be a bool tensor"),
        ({"spec": "dapo"}, TypeError, "`spec` must be a PolicyLossSpec"),
        ({"rollout_topk_ids": None}, ValueError, "needs `rollout_topk_ids`"),
        ({"rollout_topk_logprobs": torch.zeros(2, 3, 9)}, ValueError, "`rollout_topk_logprobs` must have shape"),
        ({"topk_valid": torch.ones(2, 3, 4)}, TypeError, "`topk_valid` must be a bool tensor"),
        ({"spec": PRESETS["ppo"]}, ValueError, "`rollout_topk_ids` is given"),
        ({"spec": PRESETS["dppo_topk_tv"].replace(beta=0.1)}, ValueError, "`ref_logprobs` is needed"),
        ({"token_weights": torch.ones(2)}, ValueError, "`token_weights` must be"),
        ({"workspace_bytes": -1}, ValueError, "`workspace_bytes` must be an int >= 0"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive"),
        ({"denominator": 0.0}, ValueError, "`denominator` must be positive"),
        ({"denominator": torch.ones(2)}, ValueError, "`denominator` must be one number"),
        (
            {"spec": PRESETS["dppo_topk_tv"].replace(entropy_coef=0.1), "entropy_denominator": 0.0},
            ValueError,
            "`entropy_denominator` must be positive",
        ),
        ({"backend": "cuda"}, ValueError, "cannot serve linear_policy_loss"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    hidden, weight, _ = BASE.leaves()
    with pytest.raises(error, match=message):
        linear_policy_loss(hidden, weight, **(BASE.arguments() | changes))


def test_bad_values_on_cpu() -> None:
    hidden, weight, _ = BASE.leaves()
    arguments = BASE.arguments() | {"loss_mask": torch.ones(2, 3, dtype=torch.bool)}
    arguments["ids"] = torch.full((2, 3), 53)
    with pytest.raises(ValueError, match=r"`ids` must be in \[0, 53\)"):
        linear_policy_loss(hidden, weight, **arguments)
    arguments["ids"] = torch.zeros(2, 3, dtype=torch.long)
    arguments["rollout_topk_ids"] = torch.full((2, 3, 4), 99)
    with pytest.raises(ValueError, match="`rollout_topk_ids` must be below 53"):
        linear_policy_loss(hidden, weight, **arguments)


def test_sequence_losses_need_sequences() -> None:
    case = replace(PolicyCase("gspo"), b=1)
    hidden, weight, _ = case.leaves()
    flat = {k: x.reshape(-1) if isinstance(x, torch.Tensor) and x.dim() == 2 else x for k, x in case.arguments().items()}
    flat["advantages"] = flat["advantages"].expand(case.t)
    with pytest.raises(ValueError, match=r"needs \[B, T\] `ids`"):
        linear_policy_loss(hidden[0], weight, **flat)


def test_explain_names_the_design() -> None:
    explain = functools.partial(explain_linear_policy_loss, n_rows=8192, vocab=151936, sequence_length=1024)
    assert "gradient in the forward, 1 x 69 rows" in explain(PRESETS["dapo"])
    assert "recomputed" in explain(PRESETS["dapo"], workspace_bytes=0)
    assert "whole sequences" in explain(PRESETS["gspo"], workspace_bytes=1 << 30)
    assert "recompute the rest" in explain(PRESETS["gspo"])
    assert "scored only" in explain(PRESETS["gspo"], needs_gradient=False)
    assert explain(PRESETS["dapo"], backend="reference").startswith("reference")
