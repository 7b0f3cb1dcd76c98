"""Top-K with the sampled token injected: every backend against a stable sort and float64."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import _ext, topk_logprobs
from dppo_kernels.token_logprobs import topk, torch_impl
from tests.memory import linux_only, peak_mb
from tests.numerics import assert_as_exact_as_torch, bit_equal, max_error
from tests.strategies import ScoringCase, scoring_cases

cpp = pytest.param("cpp", marks=pytest.mark.skipif(not _ext.CPU.loaded, reason=f"C++ extension: {_ext.CPU.reason}"))
every_backend = pytest.mark.parametrize("backend", [cpp, "torch", "reference"])
fast_backends = pytest.mark.parametrize("backend", [cpp, "torch"])


def test_the_extension_is_built_where_it_must_be() -> None:
    if os.environ.get("DPPO_KERNELS_REQUIRE_EXT") == "1":
        assert _ext.CPU.loaded, _ext.CPU.reason
        assert topk_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), 1, backend="cpp").valid.tolist() == [
            [True, False]
        ]


@fast_backends
@given(scoring_cases(dtypes=(torch.float32, torch.bfloat16, torch.float16)), st.integers(1, 128))
def test_equals_reference(backend: str, case: ScoringCase, k: int) -> None:
    k = min(k, case.vocab)
    logits, sampled = case.logits(), case.ids().clamp(min=0)
    out = topk_logprobs(logits, sampled, k, temperature=case.row_temperature(), backend=backend)
    expected = topk_logprobs(logits, sampled, k, temperature=case.row_temperature(), backend="reference")
    exact = topk_logprobs(logits.double(), sampled, k, temperature=case.row_temperature(), backend="reference")
    assert torch.equal(out.ids, expected.ids)
    assert torch.equal(out.valid, expected.valid)
    for name in ("logprobs", "sampled_logprobs", "lse"):
        same_order = torch.equal(exact.ids, expected.ids)  # rounding z / T may merge neighbours into a tie
        if same_order:
            assert_as_exact_as_torch(name, getattr(out, name), getattr(expected, name), getattr(exact, name))
    rows_without_duplicates = [len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in out.ids]
    assert all(rows_without_duplicates)
    if case.rows:
        assert (out.ids == sampled[:, None]).any(1).all()


@every_backend
def test_ties_go_to_the_lowest_id(backend: str) -> None:
    logits = torch.zeros(3, 5000, dtype=torch.bfloat16)
    logits[1, 500] = 1
    logits[2] = -0.0
    logits[2, 4000] = 0.0  # equal to -0
    out = topk_logprobs(logits, torch.tensor([4999, 500, 3]), 4, backend=backend)
    assert out.ids.tolist() == [[0, 1, 2, 3, 4999], [500, 0, 1, 2, -1], [0, 1, 2, 3, -1]]
    assert out.valid.tolist() == [[True] * 5, [True] * 4 + [False], [True] * 4 + [False]]


@fast_backends
def test_ties_at_zero_where_subnormals_are_flushed(backend: str) -> None:
    """As a library compiled with -ffast-math leaves the processor: the number below 0 is 0 there."""
    logits = torch.zeros(2, 5000)
    logits[1, 4000] = 1.0
    torch.set_flush_denormal(True)
    try:
        out = topk_logprobs(logits, torch.tensor([0, 0]), 3, backend=backend)
    finally:
        torch.set_flush_denormal(False)
    assert out.ids[:, :3].tolist() == [[0, 1, 2], [4000, 0, 1]]
    assert out.logprobs[:, :3].isfinite().all()


@every_backend
def test_ties_that_the_temperature_makes(backend: str) -> None:
    """1.5 and the next number above it are the same after division by 5: the lower id comes first."""
    logits = torch.tensor([[1.5, 1.5, 1.5, 1.5 + 2**-23]])
    assert (logits / 5.0).unique().numel() == 1
    for temperature in (5.0, torch.tensor([5.0])):
        assert topk_logprobs(logits, torch.tensor([0]), 2, temperature=temperature, backend=backend).ids.tolist() == [
            [0, 1, -1]
        ]


@every_backend
def test_impossible_tokens_and_nan(backend: str) -> None:
    logits = torch.full((2, 9), -torch.inf)
    logits[:, 3], logits[:, 7] = 1.0, 0.0
    out = topk_logprobs(logits, torch.tensor([3, 8]), 4, backend=backend)
    assert out.ids.tolist() == [[3, 7, 0, 1, -1], [3, 7, 0, 1, 8]]
    assert (out.logprobs[:, 2:4] == -torch.inf).all()
    assert out.sampled_logprobs[1] == out.logprobs[1, 4] == -torch.inf
    torch.testing.assert_close(out.logprobs[0, :2], torch.log_softmax(torch.tensor([1.0, 0.0]), 0))
    logits[1, 0] = torch.nan
    with pytest.raises(ValueError, match="finite maximum in every row; row 1 has nan"):
        topk_logprobs(logits, torch.tensor([3, 8]), 4, backend=backend)
    for value in (torch.inf, -torch.inf):
        with pytest.raises(ValueError, match=f"row 0 has {value}"):
            topk_logprobs(torch.full((1, 5), value), torch.tensor([0]), 2, backend=backend)
    with pytest.raises(ValueError, match="row 0 has inf"):  # 1e38 is finite, 1e38 / T is not
        topk_logprobs(torch.full((1, 5), 1e38), torch.tensor([0]), 2, temperature=0.1, backend=backend)


@fast_backends
@pytest.mark.parametrize("place", [0, 2047, 2048, 4500, 4999])
@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFC00001 - 2**32])
def test_a_nan_is_found_wherever_it_is(backend: str, place: int, payload: int) -> None:
    logits = torch.randn(3, 5000)
    logits.view(torch.int32)[2, place] = payload
    with pytest.raises(ValueError, match="row 2 has nan"):
        topk_logprobs(logits, torch.zeros(3, dtype=torch.long), 5, backend=backend)
    logits[2] = -torch.inf
    logits.view(torch.int32)[2, place] = payload
    with pytest.raises(ValueError, match="row 2 has nan"):
        topk_logprobs(logits, torch.zeros(3, dtype=torch.long), 5, backend=backend)


@fast_backends
def test_all_values_of_a_half_precision_type(backend: str) -> None:
    """Every float16 and bfloat16 that is not NaN or +inf, subnormals included, in one row."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        row = values[(values < torch.inf)][None, torch.randperm(int((values < torch.inf).sum()))].contiguous()
        everything = topk_logprobs(row, torch.tensor([7]), 128, backend=backend)
        assert torch.equal(everything.ids, topk_logprobs(row, torch.tensor([7]), 128, backend="reference").ids)
        small = row[:, row[0].abs() < 1e-30 if dtype == torch.bfloat16 else row[0].abs() < 6e-5]
        out, expected = (topk_logprobs(small, torch.tensor([0]), 128, backend=name) for name in (backend, "reference"))
        assert torch.equal(out.ids, expected.ids)
        torch.testing.assert_close(out.lse, expected.lse)


KINDS = ("normal", "ties", "constant", "impossible", "ascending", "descending", "huge", "peak", "zeros")


def fuzz_rows(kind: str, rows: int, vocab: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """[rows, vocab] of one kind; |logit| <= 16 except for "huge"."""
    x = torch.randn(rows, vocab, generator=g) * torch.rand(rows, 1, generator=g) * 4
    if kind == "ties":
        x = torch.randint(-2, 3, (rows, vocab), generator=g).float()
    elif kind == "constant":
        x = torch.randn(rows, 1, generator=g).expand(rows, vocab)
    elif kind == "impossible":  # from a few to all but one
        x = x.masked_fill(torch.rand(rows, vocab, generator=g) < torch.rand(rows, 1, generator=g) ** 0.2, -torch.inf)
        x[:, int(torch.randint(vocab, (1,), generator=g))] = 1.0
    elif kind in ("ascending", "descending"):
        x = x.sort(dim=1, descending=kind == "descending").values
    elif kind == "huge":
        x = x * (1000 if dtype == torch.float16 else 1e30)
    elif kind == "peak":
        x[:, -1] = 16
    elif kind == "zeros":
        x = torch.where(torch.rand(rows, vocab, generator=g) < 0.5, 0.0, -0.0)
    return (x if kind == "huge" else x.clamp(max=16)).to(dtype)


@fast_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ten_thousand_random_rows_against_a_stable_sort(backend: str, dtype: torch.dtype) -> None:
    """V from 1 to 200,000, log-uniform; ids exact, log-probs within 3e-6 of float64 where |logit| <= 16."""
    g = torch.Generator().manual_seed(1)
    wanted = 10_000 if backend == "cpp" else 1_000
    done, case = 0, 0
    while done < wanted:
        vocab = round(math.exp(torch.rand(1, generator=g).item() * math.log(200_000))) if case else 200_000
        rows = min(8, wanted - done)
        k = int(torch.randint(1, min(vocab, 128) + 1, (1,), generator=g))
        logits = fuzz_rows(KINDS[case % len(KINDS)], rows, vocab, dtype, g)
        sampled = torch.randint(vocab, (rows,), generator=g)
        temperature: float | Tensor = (1.0, 0.7, torch.rand(rows, generator=g) + 0.5)[case // len(KINDS) % 3]
        z = logits.float() / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
        order = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k]
        out = topk_logprobs(logits, sampled, k, temperature=temperature, backend=backend)
        what = f"case {case}: {KINDS[case % len(KINDS)]}, V {vocab}, K {k}"
        assert torch.equal(out.ids[:, :k], order), what
        outside = ~(order == sampled[:, None]).any(1)
        assert torch.equal(out.ids[:, k], torch.where(outside, sampled, -1)), what
        if KINDS[case % len(KINDS)] != "huge":
            lse = z.double().logsumexp(1)
            exact = z.gather(1, torch.cat([order, sampled[:, None]], 1)).double() - lse[:, None]
            exact[~outside, k] = 0
            bound = 3e-6 * max(1.0, z.amax().item() / 16, -z[z > -torch.inf].amin().item() / 16)
            assert max_error(out.logprobs, exact) <= bound, what
            assert max_error(out.lse, lse) <= bound, what
        done, case = done + rows, case + 1


@every_backend
def test_views_are_read_in_place_or_copied(backend: str) -> None:
    wide = torch.randn(4, 3, 2000)
    sampled = torch.randint(0, 1000, (4,))
    for logits in (
        wide[:, -1, :1000],
        wide[:, 1, 5:1005],
        wide[:, 0, ::2],
        wide[:1, 0, :1000].expand(4, 1000),
        wide[:, 0].t()[:4, :4].t(),
    ):
        ids = sampled % logits.shape[1]
        for a, b in zip(
            topk_logprobs(logits, ids, 3, backend=backend),
            topk_logprobs(logits.contiguous(), ids, 3, backend=backend),
            strict=True,
        ):
            assert bit_equal(a, b)
    temperature = torch.tensor([0.5, 9.0, 2.0, 9.0])[::2]
    arguments = (torch.randn(2, 50), torch.tensor([0, 1]), 3, temperature, 1.0, True)
    if backend != "reference":
        op = torch.ops.dppo_kernels.topk_logprobs
        for a, b in zip(op(*arguments, backend), op(*arguments, "torch"), strict=True):
            torch.testing.assert_close(a, b)
    nothing = topk_logprobs(torch.zeros(2, 0, 7), torch.zeros(2, 0, dtype=torch.long), 3, backend=backend)
    assert nothing.ids.shape == (2, 0, 4)
    assert topk_logprobs(torch.zeros(7), torch.tensor(2), 3, backend=backend).ids.tolist() == [0, 1, 2, -1]


@fast_backends
def test_shifting_a_row_of_logits_changes_nothing(backend: str) -> None:
    # Multiples of 1/256 and whole shifts below 2^15 are exact in float32, so that not one bit may change.
    logits = torch.randint(-2000, 2000, (9, 5000)) / 256
    ids, shift = torch.randint(0, 5000, (9,)), torch.randint(-1000, 1000, (9, 1)).float()
    shifted, plain = (topk_logprobs(x, ids, 5, backend=backend) for x in (logits + shift, logits))
    assert bit_equal(shifted.logprobs, plain.logprobs)
    assert bit_equal(shifted.ids, plain.ids)


@fast_backends
def test_a_row_has_the_same_bits_in_any_batch(backend: str) -> None:
    logits, ids = torch.randn(300, 5000), torch.randint(0, 5000, (300,))
    top = topk_logprobs(logits, ids, 7, backend=backend)
    for rows in (slice(0, 1), slice(299, 300), slice(100, 203)):
        for a, b in zip(topk_logprobs(logits[rows], ids[rows], 7, backend=backend), top, strict=True):
            assert bit_equal(a, b[rows])


def test_chunks_do_not_matter(monkeypatch) -> None:
    logits, ids = torch.randn(10, 30), torch.randint(0, 30, (10,))
    whole = topk_logprobs(logits, ids, 3, backend="torch")
    monkeypatch.setattr(torch_impl, "pick_row_chunk", lambda vocab: 3)
    for a, b in zip(topk_logprobs(logits, ids, 3, backend="torch"), whole, strict=True):
        assert bit_equal(a, b)


@fast_backends
def test_no_gradient_flows(backend: str) -> None:
    logits = torch.randn(2, 9, requires_grad=True)
    out = topk_logprobs(logits, torch.tensor([0, 8]), 2, backend=backend)
    assert not any(x.requires_grad for x in out)


def test_float64_runs_on_torch() -> None:
    logits, sampled = torch.randn(2, 9, dtype=torch.float64), torch.tensor([0, 8])
    assert topk_logprobs(logits, sampled, 2).logprobs.dtype == torch.float64
    with pytest.raises(ValueError, match="backend='cpp' cannot serve topk_logprobs"):
        topk_logprobs(logits, sampled, 2, backend="cpp")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 0}, ValueError, r"`k` must be in \[1, min\(V, 128\)\] = \[1, 11\], got 0"),
        ({"k": 12}, ValueError, "got 12"),
        ({"k": True}, TypeError, "`k` must be an int, got bool"),
        (
            {"sampled_ids": torch.tensor([0, 1, -1, 2])},
            ValueError,
            r"`sampled_ids` must be in \[0, 11\); got -1 at index \[2\]",
        ),
        ({"sampled_ids": torch.zeros(5, dtype=torch.long)}, ValueError, r"`logits` must be \[\*sampled_ids.shape, V\]"),
        ({"sampled_ids": torch.zeros(4)}, TypeError, "`sampled_ids` must hold token ids"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive"),
        ({"temperature": torch.ones(3)}, ValueError, "`temperature`"),
        ({"backend": "triton"}, ValueError, "backend='triton' cannot serve topk_logprobs"),
        ({"backend": "cuda"}, ValueError, "it serves cuda tensors, these are on cpu"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.randn(4, 11), "sampled_ids": torch.zeros(4, dtype=torch.long), "k": 3}
    with pytest.raises(error, match=message):
        topk_logprobs(**{**arguments, **changes})


@fast_backends
def test_opcheck(backend: str) -> None:
    logits, ids = torch.randn(5, 30), torch.randint(0, 30, (5,))
    for row_temperature in (None, torch.rand(5) + 0.5):
        arguments = (logits, ids, 4, row_temperature, 1.0, False, backend)
        assert set(torch.library.opcheck(topk._topk_op, arguments).values()) == {"SUCCESS"}


@fast_backends
def test_compiled_equals_eager(backend: str) -> None:
    logits, ids = torch.randn(6, 30), torch.randint(0, 30, (6,))
    compiled = torch.compile(lambda x: topk_logprobs(x * 2, ids, 4, temperature=0.7, backend=backend), fullgraph=True)
    eager = topk_logprobs(logits * 2, ids, 4, temperature=0.7, backend=backend)
    for a, b in zip(compiled(logits), eager, strict=True):
        assert torch.equal(a, b)


@linux_only
@pytest.mark.skipif(not _ext.CPU.loaded, reason=f"C++ extension: {_ext.CPU.reason}")
def test_extra_memory_is_a_few_pages() -> None:
    """The log-softmax of these logits takes 156 MB."""
    setup = """
import torch
from dppo_kernels import topk_logprobs
torch.set_num_threads(2)
logits, ids = torch.randn(256, 151936), torch.arange(256)
topk_logprobs(logits[:8], ids[:8], 20, backend="cpp")
kept = 0
"""
    used = peak_mb(setup, 'top = topk_logprobs(logits, ids, 20, backend="cpp")')
    print(f"\n{used:.2f} MB above the logits")
    assert used < 4 * 2**20 / 1e6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 500])
def test_cuda_against_a_stable_sort(dtype: torch.dtype, rows: int) -> None:
    """Every kind of row, whole and split over several blocks, against the reference on the CPU."""
    assert _ext.CUDA.loaded, _ext.CUDA.reason
    g = torch.Generator().manual_seed(2)
    for case, kind in enumerate(KINDS):
        for vocab in (1, 130, 5001, 151936):
            k = min(vocab, (20, 1, 128)[case % 3])
            logits, sampled = fuzz_rows(kind, rows, vocab, dtype, g), torch.randint(vocab, (rows,), generator=g)
            temperature: float | Tensor = (1.0, 0.7, torch.rand(rows, generator=g) + 0.5)[case % 3]
            on_device = temperature.cuda() if isinstance(temperature, Tensor) else temperature
            out = topk_logprobs(logits.cuda(), sampled.cuda(), k, temperature=on_device, backend="cuda", check_values=True)
            expected = topk_logprobs(logits, sampled, k, temperature=temperature, backend="reference")
            assert torch.equal(out.ids.cpu(), expected.ids), f"{kind}, V {vocab}, K {k}"
            if kind != "huge":
                torch.testing.assert_close(out.logprobs.cpu(), expected.logprobs, rtol=0, atol=1e-5)
                torch.testing.assert_close(out.lse.cpu(), expected.lse, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_cuda_refuses_nan_runs_on_the_current_stream_and_repeats_its_bits() -> None:
    logits, sampled = torch.randn(64, 151936, device="cuda"), torch.randint(151936, (64,), device="cuda")
    first = topk_logprobs(logits, sampled, 20, backend="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        again = topk_logprobs(logits * 1, sampled, 20, backend="cuda")
    side.synchronize()
    assert all(bit_equal(a, b) for a, b in zip(first, again, strict=True))
    logits[3, 70_000] = torch.nan
    with pytest.raises(ValueError, match="row 3 has nan"):
        topk_logprobs(logits, sampled, 20, backend="cuda", check_values=True)


@pytest.mark.gpu
def test_cuda_offsets_beyond_32_bits() -> None:
    logits = torch.zeros(15_000, 151_936, dtype=torch.bfloat16, device="cuda")
    logits[-1, 151_000:151_003] = torch.tensor([3.0, 2.0, 1.0], device="cuda")
    out = topk_logprobs(logits, torch.full((15_000,), 5, device="cuda"), 3, backend="cuda")
    assert out.ids[-1].tolist() == [151_000, 151_001, 151_002, 5]
    assert out.ids[0].tolist() == [0, 1, 2, 5]
