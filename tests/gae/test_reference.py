"""The definition: against sums written out, and what follows from it for every backend."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import gae
from tests.gae.cases import GaeCase, batch_invariant_backends, compacted, every_backend, gae_cases


def written_out(rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float) -> list[float]:
    """``A_t = sum_k (gamma lam)^k delta_(t+k)`` of one row in which everything counts."""
    following = [*values, bootstrap][1:]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@given(gae_cases(steps=(1, 2, 7, 20), max_rows=3))
def test_the_sums_written_out(case: GaeCase) -> None:
    rewards, values, mask = case.inputs(torch.float64)
    options = case.options(torch.float64)
    out = gae(rewards, values, mask, **options, backend="reference")
    lam, lam_value = options["lam"], options["lam"] if options["lam_value"] is None else options["lam_value"]
    for row in range(case.rows):
        r, v = (compacted(x, mask, row)[0].tolist() for x in (rewards, values))
        end = 0.0 if options["bootstrap"] is None else options["bootstrap"][row].item()
        l1, l2 = (float(x[row]) if isinstance(x, Tensor) else x for x in (lam, lam_value))
        expected = torch.tensor(written_out(r, v, case.gamma, l1, end), dtype=torch.float64)
        torch.testing.assert_close(compacted(out.advantages, mask, row)[0], expected)
        targets = torch.tensor([a + b for a, b in zip(written_out(r, v, case.gamma, l2, end), v, strict=True)])
        torch.testing.assert_close(compacted(out.returns, mask, row)[0], targets.double(), rtol=1e-6, atol=1e-6)


@every_backend
@given(gae_cases())
def test_lambda_0_is_one_step_and_lambda_1_the_monte_carlo_return(backend: str, case: GaeCase) -> None:
    rewards, values, mask = case.inputs()
    options = {"gamma": 1.0, "bootstrap": case.options()["bootstrap"], "backend": backend}
    short, long = (gae(rewards, values, mask, lam=lam, **options) for lam in (0.0, 1.0))
    r, v = (torch.where(mask, x, 0.0).double() for x in (rewards, values))
    end = torch.zeros(case.rows) if options["bootstrap"] is None else options["bootstrap"]
    to_go = r.flip(1).cumsum(1).flip(1) + end[:, None]
    torch.testing.assert_close(long.returns, torch.where(mask, to_go, 0.0).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(long.advantages, torch.where(mask, to_go - v, 0.0).float(), rtol=1e-5, atol=1e-5)
    for row in range(case.rows):
        here, value = compacted(short.advantages, mask, row), compacted(v, mask, row)
        following = torch.cat([value[:, 1:], end[row].double().reshape(1, 1)], 1)[:, : value.shape[1]]
        expected = compacted(r, mask, row) + following - value
        torch.testing.assert_close(here, expected.float(), rtol=1e-5, atol=1e-5)


@every_backend
@given(gae_cases(), st.integers(0, 2**20))
def test_masked_positions_anywhere_are_as_if_they_were_not_there(backend: str, case: GaeCase, seed: int) -> None:
    rewards, values, mask = case.inputs()
    options = case.options() | {"backend": backend}
    out = gae(rewards, values, mask, **options)
    assert not out.advantages[~mask].any()
    assert not out.returns[~mask].any()
    g = torch.Generator().manual_seed(seed)
    wider = case.steps + int(torch.randint(0, 40, (), generator=g))
    places = torch.rand(case.rows, wider, generator=g).argsort(1)[:, : case.steps].sort(1).values

    def spread(x: Tensor, filler: float) -> Tensor:
        return torch.full((case.rows, wider), filler, dtype=x.dtype).scatter_(1, places, x)

    apart = gae(spread(rewards, torch.nan), spread(values, torch.nan), spread(mask, False), **options)
    for found, expected in zip(apart, out, strict=True):
        tolerance = {"rtol": 0, "atol": 0} if backend == "reference" else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(found.gather(1, places), expected, **tolerance)


@every_backend
@given(gae_cases())
def test_a_bootstrap_is_one_more_token(backend: str, case: GaeCase) -> None:
    """With gamma: the value of a last token that brings nothing itself, and lambda applies to what it adds."""
    rewards, values, mask = case.inputs()
    g = torch.Generator().manual_seed(case.seed)
    bootstrap = torch.randn(case.rows, generator=g)
    options = {"gamma": case.gamma, "lam": case.options()["lam"], "backend": backend}
    out = gae(rewards, values, mask, bootstrap=bootstrap, **options)
    column = torch.ones(case.rows, 1)
    # Its own delta is 0: reward = value, and nothing follows.
    more = [
        torch.cat([x, y], 1) for x, y in ((rewards, bootstrap[:, None]), (values, bootstrap[:, None]), (mask, column.bool()))
    ]
    longer = gae(*more, **options)
    for found, expected in zip(longer, out, strict=True):
        torch.testing.assert_close(found[:, :-1], expected, rtol=1e-5, atol=1e-5)


@every_backend
@given(gae_cases())
def test_two_lambdas_are_two_calls(backend: str, case: GaeCase) -> None:
    inputs, options = case.inputs(), case.options() | {"backend": backend}
    both = gae(*inputs, **options)
    lam_value = options.pop("lam_value")
    one = gae(*inputs, **options)
    assert torch.equal(both.advantages, one.advantages)
    if lam_value is None:
        assert torch.equal(both.returns, one.returns)
    else:
        other = gae(*inputs, **options | {"lam": lam_value})
        torch.testing.assert_close(both.returns, other.returns, rtol=1e-6, atol=1e-6)


@batch_invariant_backends
@given(gae_cases(), st.integers(0, 2**20))
def test_a_row_has_the_same_bits_in_any_batch(backend: str, case: GaeCase, seed: int) -> None:
    inputs, options = case.inputs(), case.options() | {"backend": backend}
    out = gae(*inputs, **options)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(case.rows, generator=g)[: int(torch.randint(0, case.rows + 1, (), generator=g))]
    chosen = {name: x[order] if isinstance(x, Tensor) else x for name, x in options.items()}
    part = gae(*(x[order] for x in inputs), **chosen)
    again = gae(*inputs, **options)
    for found, whole, rerun in zip(part, out, again, strict=True):
        assert torch.equal(found, whole[order])
        assert torch.equal(rerun, whole)
