"""`linear_preference_loss` against its definition: every loss, dtype, mask and workspace; its contract."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import (
    LoraWeight,
    PreferenceSpec,
    explain_linear_preference_loss,
    linear_logprobs,
    linear_preference_loss,
    linear_sequence_logprobs,
    preference_loss,
    sequence_logprobs,
)
from dppo_kernels.linear_preference_loss import op
from tests.linear_preference_loss.cases import (
    SPECS,
    TRAINED,
    Found,
    PreferenceCase,
    head,
    preference_cases,
    run,
    steepness,
)
from tests.numerics import assert_as_exact_as_torch, bit_equal

ALL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The strict mode; sixteen rows; everything.
WORKSPACES = (0, 16 * 123 * 8, 1 << 20)


def hold_to_reference(case: PreferenceCase, backend: str, device: str = "cpu", **options: Any) -> Found:
    """As exact as torch in values, per-token results and gradients; returns what was found."""
    found = values, grads, rest = run(case, case.dtype, backend, device, **options)
    exact, exact_grads, exact_rest = run(case, torch.float64, "reference")
    rounds = case.lora or case.dtype == torch.float64
    in_torch, torch_grads, _ = run(case, case.dtype if rounds else torch.float32, "reference")
    # The log-prob of a sequence is a sum of T numbers as exact as logits; the loss is that much less exact.
    largest = max(1.0, case.largest_logit()) * case.t
    steep = largest * steepness(case, exact, exact_rest["lengths"])
    assert values.keys() == exact.keys()
    for name, value in values.items():
        assert_as_exact_as_torch(name, value, in_torch[name], exact[name], largest=steep if name == "loss" else largest)
    assert grads.keys() == exact_grads.keys()
    # Steep divergences far from the reference: float16 has no such numbers, in torch either.
    held = 5 * steep <= torch.finfo(case.dtype).max
    for name, grad in grads.items() if held else ():
        # Coefficients change with the log-probs; and a gradient is divided by the temperature once.
        assert_as_exact_as_torch(f"d{name}", grad, torch_grads[name].to(case.dtype), exact_grads[name], largest=5 * steep)
    assert torch.equal(rest["lengths"], exact_rest["lengths"])
    assert rest["lengths"].sum() == case.mask().sum()
    assert rest["stats"].keys() == exact_rest["stats"].keys()
    assert rest["stats"]["margins"][1] == case.pairs
    assert rest["stats"]["entropy"][1] == case.mask().sum()
    if case.softcap is None and case.dtype in ALL[:2]:
        assert torch.equal(rest["is_top1"], exact_rest["is_top1"])
    return found


@pytest.mark.parametrize("workspace", WORKSPACES)
@given(case=preference_cases(dtypes=ALL))
@example(case=PreferenceCase(SPECS[-1], t=11, softcap=5.0, bias=True, lora=True, temperature="per_row", packed=True))
@example(case=PreferenceCase(SPECS[3], pairs=5, t=11, vocab=123, dtype=torch.bfloat16, masked="prompt", layout="strided"))
@example(case=PreferenceCase(SPECS[8], pairs=5, dtype=torch.float16, reference="given", packed=True))
def test_as_exact_as_torch(workspace: int, case: PreferenceCase) -> None:
    hold_to_reference(case, "torch", workspace_bytes=workspace)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{'+'.join(spec.loss_type)}-{spec.f_divergence_type}")
def test_every_loss_and_its_gradient(spec: PreferenceSpec) -> None:
    shape = {"pairs": 4, "t": 5, "scale": 0.3, "dtype": torch.float64}  # near the reference: no loss is saturated
    case = PreferenceCase(spec, bias=True, lora=True, temperature="per_row", **shape)
    ours, theirs = (run(case, torch.float64, backend) for backend in ("torch", "reference"))
    assert any(grad.any() for grad in ours[1].values())
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    for name, stat in theirs[2]["stats"].items():
        for a, b in zip(ours[2]["stats"][name], stat, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_it_is_the_composition_of_the_parts() -> None:
    """Scoring, summing and `preference_loss`, each written out here, in float64."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 5, generator=g, dtype=torch.float64, requires_grad=True)
    ref_hidden, ref_weight = torch.randn(6, 8, 4, generator=g).double(), torch.randn(19, 4, generator=g).double()
    ids, mask = torch.randint(0, 19, (6, 8), generator=g), torch.arange(8) >= torch.tensor([[2], [3], [1], [5], [0], [2]])
    spec = PreferenceSpec(("sigmoid_norm", "nca_pair", "sft"), beta=0.7, ld_alpha=0.25)
    tokens = torch.log_softmax(hidden @ weight.t(), -1).gather(2, ids[..., None])[..., 0]
    ref_tokens = torch.log_softmax(ref_hidden @ ref_weight.t(), -1).gather(2, ids[..., None])[..., 0]
    lengths = mask.sum(1)
    shared = torch.minimum(lengths[:3], lengths[3:]).repeat(2)
    factor = torch.where(mask.cumsum(1) > shared[:, None], 0.25, 1.0) * mask
    sums, ref_sums = (tokens * factor).sum(1), (ref_tokens * factor).sum(1)
    torch.testing.assert_close(sequence_logprobs(tokens, mask, ld_alpha=0.25), sums)
    expected, stats = preference_loss(
        *(sums[:3], sums[3:], ref_sums[:3], ref_sums[3:]),
        spec=spec,
        chosen_lengths=lengths[:3],
        rejected_lengths=lengths[3:],
        sft_logprobs=(tokens * mask).sum(1)[:3],
    )
    loss, fused, aux = linear_preference_loss(
        hidden, weight, ids, mask, spec=spec, ref_hidden=ref_hidden, ref_weight=ref_weight, return_aux=True
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)))
    torch.testing.assert_close(aux.logprobs, sums.detach())
    torch.testing.assert_close(aux.ref_logprobs, ref_sums)
    for name, stat in stats.items():
        torch.testing.assert_close(fused[name].mean, stat.mean)


@pytest.mark.parametrize("workspace", [None, 0, 16 * 53 * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True])
def test_the_first_loss_is_exactly_log_2(given: bool, dtype: torch.dtype, workspace: int | None) -> None:
    """The policy is its own reference: scored here from its hidden states, or before by `linear_sequence_logprobs`."""
    case = PreferenceCase(PreferenceSpec(), pairs=5, t=11, dtype=dtype, reference="same", bias=True, lora=True, poison=False)
    leaves = case.leaves()
    arguments = {"bias": leaves["bias"], "workspace_bytes": workspace}
    rows = (leaves["hidden"], head(leaves), case.ids(), case.mask())
    reference = {"ref_hidden": leaves["hidden"], "ref_weight": head(leaves), "ref_bias": leaves["bias"]}
    if given:
        reference = {"ref_logprobs": linear_sequence_logprobs(*rows, **arguments).logprobs}
    leaves["hidden"].requires_grad_()
    loss, stats = linear_preference_loss(*rows, **reference, **arguments)
    assert loss.item() == torch.tensor(math.log(2), dtype=torch.float32).item()
    assert stats["margins"].sum == stats["margins"].max == 0


def test_a_prompt_boundary_off_by_one_is_another_loss() -> None:
    """A token of the prompt too many, or one of the completion too few, moves the loss by far more than rounding."""
    case = PreferenceCase(PreferenceSpec(beta=0.5), pairs=4, t=11, masked="none", poison=False)
    leaves, other = case.leaves(), case.reference_model()
    starts = torch.tensor([2, 3, 4, 5, 3, 2, 5, 4])[:, None]
    ids = case.ids()

    def loss(first: Tensor, labels: Tensor = ids) -> float:
        mask = torch.arange(11) >= first
        arguments = {"ref_hidden": other["hidden"], "ref_weight": other["weight"]}
        return linear_preference_loss(leaves["hidden"], leaves["weight"], labels, mask, **arguments)[0].item()

    right = loss(starts)
    assert abs(loss(starts - 1) - right) > 1e-2
    assert abs(loss(starts + 1) - right) > 1e-2
    assert abs(loss(starts, ids.roll(1, 1)) - right) > 1e-2  # labels that are not shifted


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("weighting", [False, True])
@pytest.mark.parametrize("outputs", [(), ("entropy",), ("entropy", "is_top1", "mean_logits")])
def test_what_else_is_asked_for_changes_no_bit_of_the_first_loss(
    outputs: tuple[str, ...], weighting: bool, softcap: float | None
) -> None:
    """At a vocabulary of several pieces, whose sums depend on their order."""
    shape = {"pairs": 4, "t": 32, "vocab": 20_011, "hidden_size": 64}
    case = PreferenceCase(reference="same", masked="prompt", poison=False, **shape)
    leaves = case.leaves()
    rows = (leaves["hidden"], leaves["weight"], case.ids(), case.mask())
    options = {"spec": PreferenceSpec(use_weighting=weighting), "outputs": outputs, "softcap": softcap}
    before = linear_sequence_logprobs(*rows, **options).logprobs
    for reference in ({"ref_logprobs": before}, {"ref_hidden": leaves["hidden"], "ref_weight": leaves["weight"]}):
        _, stats = linear_preference_loss(*rows, **reference, **options)
        assert stats["margins"].max == stats["margins"].sum == stats["rewards_chosen"].sum == 0


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[-1], PreferenceSpec("aot", label_smoothing=0.1)])
def test_nan_behind_the_mask_changes_nothing(spec: PreferenceSpec) -> None:
    case = PreferenceCase(spec, pairs=4, t=9, bias=True, lora=True, temperature="per_row", masked="prompt")
    assert case.leaves()["hidden"][~case.mask()].isnan().all()
    for backend in ("torch", "reference"):
        poisoned, same = (run(replace(case, poison=p), torch.float32, backend) for p in (True, False))
        for ours, others in zip(poisoned[:2], same[:2], strict=True):
            for name, value in ours.items():
                assert bit_equal(value, others[name]), name
                assert not value.isnan().any(), name
        assert poisoned[2]["stats"] == same[2]["stats"]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_pairs_without_tokens_count_as_the_references(backend: str) -> None:
    values, grads, rest = run(PreferenceCase(masked="all", bias=True, lora=True), torch.float32, backend)
    assert values["loss"] == pytest.approx(math.log(2))
    assert not any(grad.any() for grad in grads.values())
    assert not rest["lengths"].any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_rows_at_all(shape: tuple[int, int], backend: str) -> None:
    hidden, weight = torch.randn(*shape, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)
    loss, _ = linear_preference_loss(hidden, weight, ids, mask, ref_logprobs=torch.zeros(shape[0]), backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) * shape[0] / 2)
    assert not weight.grad.any()
    assert hidden.grad.shape == hidden.shape


@given(st.integers(0, 2**20), st.sampled_from(SPECS[:13]))
def test_permuted_pairs_and_micro_batches_give_the_same(seed: int, spec: PreferenceSpec) -> None:
    """Permuting pairs commutes; parts that divide by the whole batch's numbers add up to it, unless pairs are sorted."""
    spec = spec.replace(loss_type=(*spec.loss_type, "sft"))
    case = PreferenceCase(spec, pairs=4, dtype=torch.float64, seed=seed, poison=False)
    leaves, other = case.leaves(), case.reference_model()
    hidden, weight = leaves["hidden"].requires_grad_(), leaves["weight"].requires_grad_()
    ids, mask = case.ids(), case.mask()

    def loss(pairs: Tensor, **numbers: Any) -> Tensor:
        rows = torch.cat([pairs, pairs + 4])
        reference = {"ref_hidden": other["hidden"][rows], "ref_weight": other["weight"]}
        return linear_preference_loss(hidden[rows], weight, ids[rows], mask[rows], spec=case.spec, **reference, **numbers)[0]

    whole = loss(torch.arange(4))
    expected = torch.autograd.grad(whole, (hidden, weight))
    permuted = loss(torch.tensor([2, 0, 3, 1]))
    torch.testing.assert_close(permuted, whole)
    torch.testing.assert_close(torch.autograd.grad(permuted, (hidden, weight)), expected)
    if not case.spec.couples_pairs:
        numbers = {"denominator": 4, "token_denominator": mask[:4].sum().clamp(min=1)}
        parts = [loss(torch.tensor(pairs), **numbers) for pairs in ([0], [1, 2], [3])]
        grads = [torch.autograd.grad(part, (hidden, weight)) for part in parts]
        torch.testing.assert_close(sum(parts), whole)
        torch.testing.assert_close(tuple(sum(x) for x in zip(*grads, strict=True)), expected)


def test_a_shared_prompt_is_scored_from_one_row() -> None:
    """Prompt of 3, completions of 2 and 4: the prompt's last row predicts the first token of both."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3 + 2 + 4, 6, generator=g, dtype=torch.float64, requires_grad=True)
    weight, tokens = torch.randn(17, 6, generator=g).double(), torch.randint(0, 17, (6,), generator=g)
    predicted_by = torch.tensor([2, 3, 2, 5, 6, 7])  # rows of chosen, then rejected tokens
    packed, _ = linear_preference_loss(
        hidden[predicted_by],
        weight,
        tokens,
        torch.ones(6, dtype=torch.bool),
        sequence_ids=torch.tensor([0, 0, 1, 1, 1, 1]),
        n_pairs=1,
        ref_logprobs=torch.tensor([-5.0, -11.0]),
    )
    apart = torch.zeros(2, 6, 6, dtype=torch.float64).index_put(
        (torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([2, 3, 2, 3, 4, 5])), hidden[predicted_by]
    )
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.bool)
    ids[0, 2:4], ids[1, 2:6], mask[0, 2:4], mask[1, 2:6] = tokens[:2], tokens[2:], True, True
    padded, _ = linear_preference_loss(apart, weight, ids, mask, ref_logprobs=torch.tensor([-5.0, -11.0]))
    torch.testing.assert_close(packed, padded)
    torch.testing.assert_close(torch.autograd.grad(packed, hidden), torch.autograd.grad(padded, hidden))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[-1], PreferenceSpec(("ipo", "sft"), ld_alpha=0.4)])
def test_packed_rows_are_the_same_pairs(spec: PreferenceSpec) -> None:
    case = PreferenceCase(spec, pairs=4, t=9, bias=True, lora=True, temperature="per_row", dtype=torch.float64)
    padded, packed = (run(replace(case, packed=packed), torch.float64, "torch") for packed in (False, True))
    for name in ("loss", "logprobs", "ref_logprobs"):
        torch.testing.assert_close(packed[0][name], padded[0][name])
    assert not torch.equal(packed[0]["token_logprobs"], padded[0]["token_logprobs"].flatten())  # in another order
    torch.testing.assert_close(packed[1], padded[1])


def test_sequence_logprobs_are_those_of_the_tokens() -> None:
    case = PreferenceCase(t=11, bias=True, temperature="per_row", poison=False)
    leaves = case.leaves()
    head_of = {"bias": leaves["bias"], "temperature": case.per_token_temperature()}
    rows = (leaves["hidden"].requires_grad_(), leaves["weight"], case.ids(), case.mask())
    for alpha in (None, 0.3):
        found = linear_sequence_logprobs(*rows, spec=PreferenceSpec(ld_alpha=alpha), **head_of)
        tokens = linear_logprobs(*rows[:2], rows[2].masked_fill(~rows[3], -100), **head_of).logprobs.detach()
        torch.testing.assert_close(found.token_logprobs, tokens)
        torch.testing.assert_close(found.logprobs, sequence_logprobs(tokens.double(), rows[3], ld_alpha=alpha))
        assert torch.equal(found.lengths, rows[3].sum(1))
        assert not found.logprobs.requires_grad


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("a", "b"), ("hidden", "bias"), ()])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_frozen_inputs(trained: tuple[str, ...], workspace: int) -> None:
    case = PreferenceCase(bias=True, lora=True)
    _, everything, _ = run(case, torch.float32, "torch")
    assert tuple(everything) == TRAINED
    _, grads, _ = run(replace(case, trained=trained), torch.float32, "torch", workspace_bytes=workspace)
    assert grads.keys() == set(trained)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, everything[name])


def call(**changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hidden, weight) of a call that trains both."""
    case = PreferenceCase(poison=False)
    leaves, other = case.leaves(), case.reference_model()
    hidden, weight = leaves["hidden"].requires_grad_(), leaves["weight"].requires_grad_()
    reference = {"ref_hidden": other["hidden"], "ref_weight": other["weight"]}
    loss, _ = linear_preference_loss(hidden, weight, case.ids(), case.mask(), **(reference | changes))
    return loss, hidden, weight


def test_the_reference_gets_no_gradient() -> None:
    case = PreferenceCase(poison=False)
    leaves, other = case.leaves(), case.reference_model()
    ref_hidden, ref_weight = other["hidden"].requires_grad_(), other["weight"].requires_grad_()
    for backend in ("torch", "reference"):
        arguments = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "backend": backend}
        loss, _ = linear_preference_loss(
            leaves["hidden"].requires_grad_(), leaves["weight"], case.ids(), case.mask(), **arguments
        )
        loss.backward()
        assert ref_hidden.grad is None
        assert ref_weight.grad is None


def test_the_gradient_is_scaled_by_what_arrives() -> None:
    case = PreferenceCase(bias=True)
    _, once, _ = run(case, torch.float32, "torch")
    _, scaled, _ = run(case, torch.float32, "torch", upstream=-2.5)
    for name, grad in once.items():
        torch.testing.assert_close(scaled[name], -2.5 * grad)


def test_backward_hands_the_gradient_over_once_and_has_no_derivative() -> None:
    loss, hidden, _ = call()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_preference_loss .* backward runs once"):
        loss.backward()
    loss, hidden, _ = call()
    with pytest.raises(RuntimeError, match="linear_preference_loss has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_under_autocast_products_round_as_in_linear_logprobs() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss, hidden, weight = call()
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.float32] * 2
    case = PreferenceCase(poison=False)
    leaves, other = ({k: x.bfloat16() for k, x in model.items()} for model in (case.leaves(), case.reference_model()))
    reference = {"ref_hidden": other["hidden"], "ref_weight": other["weight"]}
    expected, _ = linear_preference_loss(leaves["hidden"], leaves["weight"], case.ids(), case.mask(), **reference)
    assert torch.equal(loss.detach(), expected)


def test_compiled_equals_eager() -> None:
    case = PreferenceCase(SPECS[-4], bias=True, lora=True, temperature="per_row", poison=False)
    leaves = {name: x.requires_grad_() for name, x in case.leaves().items()}
    other, rows, temperature = case.reference_model(), (case.ids(), case.mask()), case.per_token_temperature()

    def step(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        loss, stats, aux = linear_preference_loss(
            *(leaves["hidden"] * 2, head(leaves), *rows),
            spec=case.spec,
            ref_hidden=other["hidden"],
            ref_weight=head(other),
            ref_bias=other["bias"],
            bias=leaves["bias"],
            temperature=temperature,
            outputs=("entropy", "is_top1"),
            return_aux=True,
        )
        return loss * 3, stats["margins"].sum, aux.entropy

    outs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, *others = function(leaves)
        outs.append((loss.detach(), *others, *torch.autograd.grad(loss, list(leaves.values()))))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1", "mean_logits")])
@pytest.mark.parametrize(
    ("changes", "workspace"),
    [
        ({"reference": "model"}, None),
        ({"reference": "given", "packed": True}, None),
        ({"reference": "given", "softcap": 5.0}, 0),
        ({"spec": PreferenceSpec(use_weighting=True)}, None),
    ],
)
def test_opcheck(changes: dict[str, Any], workspace: int | None, outputs: tuple[str, ...]) -> None:
    case = PreferenceCase(**{"pairs": 2, "t": 3, "vocab": 11, "lora": True, "bias": True, "temperature": "per_row", **changes})
    seen = {}
    real = torch.ops.dppo_kernels.linear_preference_loss

    def record(*args: Any) -> Any:
        # Leaves of their own: opcheck differentiates more than once.
        seen["args"] = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args]
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.dppo_kernels, "linear_preference_loss", record)
        run(case, torch.float32, "torch", outputs=outputs, workspace_bytes=workspace)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(op._op, tuple(seen["args"]), test_utils=utils)


def test_explanations() -> None:
    shapes = {"n_pairs": 4, "sequence_length": 256, "vocab": 32000}
    assert explain_linear_preference_loss(**shapes).startswith("torch: gradient in the forward, by sequence; 2 x 163 rows")
    assert "whole sequences" in explain_linear_preference_loss(**shapes, workspace_bytes=1 << 30)
    assert "recomputed" in explain_linear_preference_loss(**shapes, workspace_bytes=0)
    assert "WPO" in explain_linear_preference_loss(PreferenceSpec(use_weighting=True), **shapes)
    assert "soft-cap" in explain_linear_preference_loss(**shapes, softcap=5.0, outputs=("mean_logits",))
    assert explain_linear_preference_loss(**shapes, backend="reference").startswith("reference: autograd")


IDS, MASK = torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.bool)
PACKED = {"hidden": torch.zeros(12, 4), "ids": IDS.flatten(), "loss_mask": MASK.flatten()}
MODEL = {"ref_logprobs": None, "ref_hidden": torch.zeros(4, 3, 5), "ref_weight": torch.zeros(7, 5)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 2, 4)}, ValueError, r"`hidden` must have shape \[\*ids.shape, H of `weight`\]"),
        ({"ids": IDS.float()}, TypeError, "`ids` must hold token ids"),
        ({"ids": IDS + 7}, ValueError, r"`ids` must be in \[0, 7\) or -100; got 7"),
        ({"ids": IDS[:3], "hidden": torch.zeros(3, 3, 4), "loss_mask": MASK[:3]}, ValueError, "chosen then rejected: got 3"),
        ({"loss_mask": MASK.long()}, TypeError, "`loss_mask` must be a bool tensor"),
        ({"loss_mask": MASK[:2]}, ValueError, "`loss_mask` must have shape that of `ids`"),
        (PACKED, ValueError, r"`ids` must be \[2P, T\], or \[N\] with `sequence_ids` and `n_pairs`; got \[12\]"),
        ({"sequence_ids": torch.zeros(4, 3).long()}, ValueError, "are for packed `ids`"),
        ({"n_pairs": 2}, ValueError, "are for packed `ids`"),
        ({**PACKED, "sequence_ids": torch.zeros(12), "n_pairs": 2}, TypeError, "`sequence_ids` must hold token ids as int64"),
        ({**PACKED, "sequence_ids": torch.zeros(3).long(), "n_pairs": 2}, ValueError, "`sequence_ids` must have shape"),
        ({**PACKED, "sequence_ids": torch.full((12,), 4), "n_pairs": 2}, ValueError, r"`sequence_ids` must be in \[0, 4\)"),
        (
            {**PACKED, "sequence_ids": torch.zeros(12).long(), "n_pairs": 0},
            ValueError,
            "`n_pairs` must be an int of at least 1",
        ),
        ({"ref_logprobs": None}, ValueError, "a reference is needed: either `ref_logprobs`, or `ref_hidden` and `ref_weight`"),
        ({**MODEL, "ref_logprobs": torch.zeros(4)}, ValueError, "a reference is needed: either"),
        ({**MODEL, "ref_weight": None}, ValueError, "a reference is needed: either"),
        ({"ref_bias": torch.zeros(7)}, ValueError, "`ref_bias` is of a reference's `ref_weight`"),
        ({"ref_logprobs": torch.zeros(2)}, ValueError, r"`ref_logprobs` must have shape \[2P\] = \[4\], got \[2\]"),
        ({"ref_logprobs": torch.zeros(4).long()}, TypeError, "`ref_logprobs` must have a floating-point dtype"),
        ({"ref_logprobs": torch.zeros(4, device="meta")}, ValueError, "`ref_logprobs` is on meta"),
        ({**MODEL, "ref_weight": torch.zeros(9, 5)}, ValueError, "`weight` has a vocabulary of 7 and `ref_weight` one of 9"),
        ({**MODEL, "ref_hidden": torch.zeros(4, 2, 5)}, ValueError, "`ref_hidden` must have shape"),
        (
            {**MODEL, "ref_hidden": torch.zeros(4, 3, 5).double(), "ref_weight": torch.zeros(7, 5).double()},
            TypeError,
            "`hidden` is torch.float32 and `ref_hidden` is torch.float64: both or none in float64",
        ),
        (
            {"weight": LoraWeight(torch.zeros(7, 4), torch.zeros(2, 4), torch.zeros(9, 2))},
            ValueError,
            "`weight.b` must have shape",
        ),
        ({"temperature": torch.ones(3)}, ValueError, "`temperature` must have shape one per row"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive"),
        ({"outputs": "entropy"}, ValueError, "`outputs` must be a sequence of names, got 'entropy'"),
        ({"outputs": ("lse",)}, ValueError, "`outputs` must be one of 'entropy', 'is_top1', 'mean_logits'; got 'lse'"),
        ({"denominator": -1.0}, ValueError, "`denominator` must be positive"),
        ({"token_denominator": torch.ones(2)}, ValueError, "`token_denominator` must be one number"),
        ({"workspace_bytes": -1}, ValueError, "`workspace_bytes` must be an int >= 0"),
        ({"backend": "cpp"}, ValueError, "linear_preference_loss"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"hidden": torch.zeros(4, 3, 4), "weight": torch.zeros(7, 4), "ids": IDS, "loss_mask": MASK}
    good["ref_logprobs"] = torch.zeros(4)
    linear_preference_loss(**good)
    with pytest.raises(error, match=message):
        linear_preference_loss(**(good | changes))
