"""What calls with a `process_group` accept, refuse, and give back."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dppo_kernels import LoraWeight, linear_distill_loss, linear_logprobs, linear_preference_loss
from tests.distributed.gang import Gang
from tests.distributed.shards import cut

V, H, N = 23, 8, 6


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=g) for shape in ((N, H), (V, H), (V,)))
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=g)


def place(how: str = "even") -> tuple[slice, dict[str, Any]]:
    cuts = cut(V, dist.get_world_size(), how)
    rank = dist.get_rank()
    options = {"process_group": dist.group.WORLD, "vocab_start": cuts[rank], "vocab_size": V}
    return slice(cuts[rank], cuts[rank + 1]), options


def _dtensors() -> None:
    hidden, weight, bias, ids = inputs()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    a, b = torch.randn(2, H, generator=torch.Generator().manual_seed(1)), torch.randn(V, 2)
    dist.broadcast(b, 0)
    whole = [x.clone().requires_grad_() for x in (hidden, weight, bias, a, b)]
    expected = linear_logprobs(whole[0], LoraWeight(whole[1], whole[3], whole[4]), ids, bias=whole[2]).logprobs
    expected.sin().sum().backward()
    base, shared_bias, shared_b = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias, b))
    shared_a, h = distribute_tensor(a, mesh, [Replicate()]).requires_grad_(), hidden.clone().requires_grad_()
    head = LoraWeight(base, shared_a, shared_b)
    found = linear_logprobs(h, head, ids, bias=shared_bias, process_group=mesh.get_group()).logprobs
    found.sin().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad, whole[0].grad, rtol=1e-5, atol=1e-5)
    for ours, x in ((base, whole[1]), (shared_bias, whole[2]), (shared_a, whole[3]), (shared_b, whole[4])):
        assert isinstance(ours.grad, DTensor)
        assert ours.grad.placements == ours.placements
        torch.testing.assert_close(ours.grad.full_tensor(), x.grad, rtol=1e-5, atol=1e-5)


def test_dtensors_know_their_place(gang: Gang) -> None:
    """V = 23 is no multiple of the ranks; gradients are DTensors with the placements of what they are of."""
    gang.run(_dtensors)


def _padded_dtensor() -> None:
    hidden, weight, _, ids = inputs()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    padded = torch.cat([weight, torch.full((5, H), torch.nan)])
    shared = distribute_tensor(padded, mesh, [Shard(0)]).requires_grad_()
    found = linear_logprobs(hidden, shared, ids, process_group=mesh.get_group(), vocab_size=V).logprobs
    torch.testing.assert_close(found, linear_logprobs(hidden, weight, ids).logprobs, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert not shared.grad.full_tensor()[V:].any()


def test_padding_gets_no_gradient(gang: Gang) -> None:
    gang.run(_padded_dtensor)


def _refused(changes: dict[str, Any]) -> tuple[str, str]:
    hidden, weight, bias, ids = inputs()
    rows, options = place()
    arguments: dict[str, Any] = {"weight": weight[rows], "bias": bias[rows], **options}
    if changes.pop("dtensor", None):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        arguments["weight"] = distribute_tensor(weight, mesh, [changes.pop("placement", Shard(0))])
    arguments |= changes
    try:
        linear_logprobs(hidden, arguments.pop("weight"), ids, bias=arguments.pop("bias"), **arguments)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"process_group": None},
            "ValueError",
            r"`vocab_start` is of a head that is shared out over a `process_group`, which is",
        ),
        ({"process_group": None, "vocab_start": None}, "ValueError", "`vocab_size` is of a head"),
        ({"process_group": "tp"}, "TypeError", "`process_group` must be a torch.distributed.ProcessGroup, got str"),
        ({"vocab_start": None}, "ValueError", "`vocab_start` and `vocab_size` must say which"),
        ({"vocab_size": None}, "ValueError", "`vocab_start` and `vocab_size` must say which"),
        ({"vocab_size": 23.0}, "TypeError", "`vocab_size` must be an int, got float"),
        ({"vocab_start": True}, "TypeError", "`vocab_start` must be an int, got bool"),
        ({"vocab_start": -1}, "ValueError", "must hold a row of the vocabulary, got .* from -1 on"),
        ({"vocab_start": 23}, "ValueError", "shards of the head must tile the vocabulary of 23"),
        ({"bias": torch.zeros(3)}, "ValueError", r"`bias` must have shape \[rows of `weight`\]"),
        ({"weight": torch.zeros(3)}, "ValueError", r"`weight` must be \[V, H\], got shape \[3\]"),
        ({"weight": torch.zeros(3, 9), "bias": None}, "ValueError", r"`hidden` must have shape"),
        ({"dtensor": True, "process_group": None, "vocab_start": None, "vocab_size": None}, "ValueError", "is a DTensor: pass"),
        ({"dtensor": True}, "ValueError", "is a DTensor, which knows where its rows lie: `vocab_start` must be None"),
        ({"dtensor": True, "placement": Shard(1), "vocab_start": None}, "ValueError", r"must be a DTensor with Shard\(0\)"),
        ({"dtensor": True, "placement": Replicate(), "vocab_start": None}, "ValueError", r"must be a DTensor with Shard\(0\)"),
        # What only all ranks together can see:
        ({"vocab_start": 0}, "ValueError", r"shards of the head must tile the vocabulary of 23, got \[start, rows\]"),
        ({"vocab_size": 24}, "ValueError", "shards of the head must tile the vocabulary of 24"),
    ],
)
def test_bad_arguments(gangs: dict[int, Gang], changes: dict[str, Any], error: str, message: str) -> None:
    for name, text in gangs[2].run(_refused, changes):
        assert name == error, text
        assert re.search(message, text), text


def _fault_of_one(fault: str) -> str:
    hidden, weight, _, ids = inputs()
    rows, options = place()
    arguments: dict[str, Any] = {"weight": weight[rows], "backend": "torch", **options}
    if fault == "only padding":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        shared = distribute_tensor(weight[:4], mesh, [Shard(0)])
        arguments = {"weight": shared, "process_group": mesh.get_group(), "vocab_size": 2}
    elif fault == "no row" and dist.get_rank():
        arguments |= {"vocab_start": V}
    elif fault == "overlap, reference":
        arguments |= {"vocab_start": 0, "backend": "reference"}
    with pytest.raises(ValueError, match=r"must tile|must hold a row") as caught:
        linear_logprobs(hidden, arguments.pop("weight"), ids % 2, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("fault", ["only padding", "no row", "overlap, reference"])
def test_a_fault_of_one_rank_is_raised_on_all(gangs: dict[int, Gang], fault: str) -> None:
    gangs[2].run(_fault_of_one, fault)


def _lonely() -> None:
    hidden, weight, _, ids = inputs()
    rows, options = place()
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    with pytest.raises(ValueError, match="the only rank of `process_group` must hold all rows of `weight`, got"):
        linear_logprobs(hidden, weight[rows], ids, **{**options, "process_group": alone})


def test_a_group_that_is_not_the_heads_is_noticed(gangs: dict[int, Gang]) -> None:
    gangs[2].run(_lonely)


def _reference() -> None:
    hidden, weight, bias, ids = inputs()
    rows, options = place("uneven")
    found = []
    for w, b, more in ((weight, bias, {}), (weight[rows], bias[rows], options)):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, w, b))
        out = linear_logprobs(h, w, ids, bias=b, gather_ids=ids[:, None], outputs=("logprobs",), backend="reference", **more)
        (out.logprobs.sin().sum() + out.gathered.sum()).backward()
        found.append((out.logprobs, h.grad, w.grad if more else w.grad[rows], b.grad if more else b.grad[rows]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_reference_takes_shards(gang: Gang) -> None:
    gang.run(_reference)


def _hidden_as_dtensor() -> None:
    hidden, weight, _, ids = inputs()
    rows, options = place()
    shared = distribute_tensor(hidden, init_device_mesh("cpu", (dist.get_world_size(),)), [Replicate()])
    with pytest.raises(ValueError, match="`hidden` must be a plain tensor, the same on all ranks"):
        linear_logprobs(shared, weight[rows], ids, **options)


def test_hidden_states_are_plain(gangs: dict[int, Gang]) -> None:
    gangs[2].run(_hidden_as_dtensor)


def _ids_out_of_range() -> str:
    hidden, weight, _, ids = inputs()
    rows, options = place()
    ids[2] = V
    with pytest.raises(ValueError, match=f"got {V} at index") as caught:
        linear_logprobs(hidden, weight[rows], ids, **options)
    return str(caught.value)


def test_ids_are_those_of_the_whole_vocabulary(gang: Gang) -> None:
    assert len(set(gang.run(_ids_out_of_range))) == 1


def _other_rows() -> None:
    hidden, weight, _, ids = inputs()
    rows, options = place()
    n = N - dist.get_rank()
    with pytest.raises(ValueError, match=r"ranks of `process_group` differ in \[vocab_size, rows of hidden\]"):
        linear_logprobs(hidden[:n], weight[rows], ids[:n], **options)


def test_ranks_must_have_the_same_rows(gang: Gang) -> None:
    gang.run(_other_rows)


def _two_heads() -> None:
    hidden, weight, _, ids = inputs()
    rows, options = place()
    mask = torch.ones(N, dtype=torch.bool)
    with pytest.raises(ValueError, match="`student_weight` has a vocabulary of"):
        linear_distill_loss(hidden, weight[rows], hidden, weight[rows][1:], mask, **options)
    shape = (2, N // 2)
    pairs = (hidden.view(*shape, H), weight[rows], ids.view(shape), mask.view(shape))
    with pytest.raises(ValueError, match="`ref_weight` one of"):
        linear_preference_loss(*pairs, ref_hidden=pairs[0], ref_weight=weight[rows][1:], **options)


def test_both_models_are_cut_alike(gangs: dict[int, Gang]) -> None:
    gangs[2].run(_two_heads)


def _compiled() -> None:
    hidden, weight, _, ids = inputs()
    rows, options = place()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, ids, temperature=0.7, **options).logprobs.sin().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
        value = function(h, w)
        value.backward()
        found.append((value.detach(), h.grad, w.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_compiled_equals_eager(gangs: dict[int, Gang]) -> None:
    """One opaque op, collectives and all."""
    gangs[2].run(_compiled)


def _alone() -> None:
    hidden, weight, bias, ids = inputs()
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    options = {"process_group": alone, "vocab_start": 0, "vocab_size": V}
    found = linear_logprobs(hidden, weight, ids, bias=bias, **options).logprobs
    assert torch.equal(found, linear_logprobs(hidden, weight, ids, bias=bias).logprobs)


def test_a_group_of_one_is_no_group(gangs: dict[int, Gang]) -> None:
    gangs[2].run(_alone)


def _autocast() -> None:
    hidden, weight, _, ids = inputs()
    rows, options = place("uneven")
    found = []
    for w, more in ((weight, {}), (weight[rows], options)):
        h = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = linear_logprobs(h, w, ids, **more).logprobs
        out.sum().backward()
        found.append((out, h.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_autocast(gangs: dict[int, Gang]) -> None:
    gangs[2].run(_autocast)
