"""What ranks run: the tests of one process, with every head of the tested call cut into shards."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dppo_kernels import LoraWeight

# Where `hold_to_reference` of a family finds the public function that it calls, and by what name.
FAMILIES = {
    "linear_logprobs": ("tests.linear_logprobs.test_op", "tests.linear_logprobs.test_op", "linear_logprobs"),
    "linear_policy_loss": ("tests.linear_policy_loss.test_op", "tests.linear_policy_loss.cases", "linear_policy_loss"),
    "linear_preference_loss": (
        "tests.linear_preference_loss.test_op",
        "tests.linear_preference_loss.cases",
        "linear_preference_loss",
    ),
    "distill": ("tests.distill.test_op", "tests.distill.cases", "linear_distill_loss"),
}
OF_THE_HEAD = ("weight", "bias", "b")  # gradients that every rank has of its own rows alone


def cut(vocab: int, ranks: int, how: str, seed: int = 0) -> list[int]:
    """Where shards begin, and V: "even" as DTensors are cut, or "uneven" with at least one row each."""
    if how == "even":
        size = -(-vocab // ranks)
        return [min(rank * size, vocab) for rank in range(ranks)] + [vocab]
    places = torch.randperm(vocab - 1, generator=torch.Generator().manual_seed(seed))[: ranks - 1] + 1
    return [0, *sorted(places.tolist()), vocab]


def sharded(function: Callable[..., Any], cuts: Sequence[int], padding: int = 0) -> Callable[..., Any]:
    """The function with its heads cut and `padding` rows of NaN behind each shard; a call of the reference stays whole."""
    signature, rank = inspect.signature(function), dist.get_rank()
    start, stop, vocab = cuts[rank], cuts[rank + 1], cuts[-1]
    padding = padding if stop == vocab else 0

    def rows(x: Tensor) -> Tensor:
        mine = x[start:stop]
        return torch.cat([mine, mine.new_full((padding, *mine.shape[1:]), torch.nan)]) if padding else mine

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("backend") == "reference":
            return function(*args, **kwargs)
        for name, value in given.items():
            if isinstance(value, LoraWeight):
                given[name] = LoraWeight(rows(value.base), value.a, rows(value.b), value.scale)
            elif name.endswith(("weight", "bias")) and value is not None:
                given[name] = rows(value)
        call.count += 1
        return function(**given, process_group=dist.group.WORLD, vocab_start=start, vocab_size=vocab)

    call.count = 0
    return call


@contextmanager
def shards(family: str, cuts: Sequence[int], padding: int = 0) -> Iterator[Any]:
    """Within it, the family's tests call a sharded function, and gradients of the head are those of all ranks together."""
    tests, cases, name = (importlib.import_module(x) if "." in x else x for x in FAMILIES[family])
    function, run = sharded(getattr(cases, name), cuts, padding), tests.run

    def complete(case: Any, dtype: torch.dtype, backend: str, *args: Any, **kwargs: Any) -> Any:
        found = run(case, dtype, backend, *args, **kwargs)
        if backend != "reference":
            for leaf, grad in found[1].items():
                if leaf in OF_THE_HEAD:
                    dist.all_reduce(grad)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, name, function)
        patch.setattr(tests, "run", complete)
        yield tests
    assert function.count, "nothing was sharded"


def hold(family: str, case: Any, backend: str, how: str, padding: int, options: dict[str, Any]) -> None:
    """`hold_to_reference` of a family, on every rank, over a head that is cut."""
    with shards(family, cut(case.vocab, dist.get_world_size(), how, case.seed), padding) as tests:
        if family == "linear_logprobs":
            tests.hold_to_reference(case, backend)
        elif family == "distill":
            tests.hold_to_reference(case, tests.run, backend, **options)
        elif family == "linear_policy_loss":
            cases = importlib.import_module(FAMILIES[family][1])
            tests.hold_to_reference(cases.with_options(case, **options), backend)
        else:
            tests.hold_to_reference(case, backend, **options)


class Traffic:
    """Elements that this rank put into collectives, by their operation."""

    def __init__(self) -> None:
        self.sums: list[int] = []
        self.maxima: list[int] = []

    @contextmanager
    def counted(self) -> Iterator["Traffic"]:
        real = dist.all_reduce

        def count(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
            # Integers are what the check of the ranks exchanges, which a GPU leaves out.
            if tensor.is_floating_point():
                (self.maxima if op == dist.ReduceOp.MAX else self.sums).append(tensor.numel())
            return real(tensor, op, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", count)
            yield self
