"""The CUDA top-K, compiled as C++ and run thread by thread in an emulator (`tests/cuda_emulator`), against the reference."""

import ctypes
import mmap
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import topk_logprobs
from dppo_kernels._tiling import TOPK_MAX_SPLITS, TOPK_MIN_SEGMENT, pick_topk_splits
from tests.numerics import assert_as_exact_as_torch, bit_equal

ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Werror"]
TILE = {torch.float32: 2048, torch.bfloat16: 4096, torch.float16: 4096}
GUARD = 64  # elements around every output and workspace that must stay as they are
Launch = Callable[..., dict[str, Tensor]]


class Arena:
    """Memory between two pages that cannot be accessed: a read past either end is an error, not luck."""

    def __init__(self, pages: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.size = pages * mmap.PAGESIZE
        self.mapping = mmap.mmap(-1, self.size + 2 * mmap.PAGESIZE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        for page in (base, base + mmap.PAGESIZE + self.size):
            assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        self.bytes = torch.frombuffer(self.mapping, dtype=torch.uint8)[mmap.PAGESIZE :][: self.size]

    def place(self, logits: Tensor, stride: int, at_end: bool) -> Tensor:
        """A copy with rows `stride` apart, NaN between them, whose first or last logit touches the forbidden page."""
        rows, vocab = logits.shape
        span = stride * (rows - 1) + vocab
        memory = self.bytes.view(logits.dtype)
        memory = memory[-span:] if at_end else memory[:span]
        memory.fill_(torch.nan)
        placed = memory.as_strided((rows, vocab), (stride, 1))
        return placed.copy_(logits)


@dataclass(frozen=True)
class KernelCase:
    """Logits of one kind as they may lie in memory, and how the kernels are launched on them."""

    kind: str
    dtype: torch.dtype
    rows: int
    vocab: int
    k: int
    splits: int
    temperature: float | str  # a number or "per_row"
    gap: int  # stride - vocab
    at_end: bool
    sampled: str  # any | best | last
    seed: int

    def logits(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.vocab)
        noise = torch.randn(shape, generator=g)
        ramp = torch.arange(self.vocab).expand(shape) / 64.0
        if self.kind in ("one_finite", "few_finite"):
            some = 1 if self.kind == "one_finite" else max(1, self.k - 1)
            places = torch.rand(shape, generator=g).argsort(1)[:, :some]
            values = torch.full(shape, -torch.inf).scatter(1, places, noise.gather(1, places))
        else:
            values = {
                "normal": noise * 4,
                "wide": noise * 40,
                "ties": torch.randint(-3, 3, shape, generator=g) / noise.sign().mul(2.0),  # with zeros of both signs
                "constant": torch.full(shape, 0.3),
                "peak": torch.where(ramp == ramp[:, self.seed % self.vocab :][:, :1], 16.0, 15.0),
                "ascending": ramp,
                "descending": -ramp,
                "stairs": (ramp / 2).floor(),  # steps of 128 equal logits
                # One per vector is tied, so that no vector may be left out; fewer than K are above.
                "one_tie": torch.where(noise > 3, 3.0, torch.where(ramp * 64 % 8 == 5, 2.0, noise.clamp(max=1.0))),
                "holes": torch.where(noise > 1, -torch.inf, noise * 8),
                "lowest": torch.where(noise > 1.5, noise, torch.finfo(self.dtype).min),
            }[self.kind]
        if self.kind in ("holes", "lowest"):
            values[:, 0] = 0.0  # the lowest number over a temperature below 1 is -inf, and all cannot be
        return values.to(self.dtype)

    def row_temperature(self) -> float | Tensor:
        if self.temperature == "per_row":
            return torch.rand(self.rows, generator=torch.Generator().manual_seed(self.seed)) + 0.5
        return float(self.temperature)

    def sampled_ids(self, logits: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(self.seed + 1)
        drawn = torch.randint(0, self.vocab, (self.rows,), generator=g)
        return {"any": drawn, "best": logits.float().argmax(1), "last": torch.full_like(drawn, self.vocab - 1)}[self.sampled]


def kernel_cases(**fixed: object) -> st.SearchStrategy[KernelCase]:
    @st.composite
    def draw(draw: st.DrawFn) -> KernelCase:
        dtype = draw(st.sampled_from(list(DTYPES)))
        tile = TILE[dtype]
        vocab = draw(st.sampled_from([1, 2, 7, 100, 257, tile - 1, tile, tile + 3, 2 * tile + 5, 3 * tile - 9]))
        drawn = KernelCase(
            kind=draw(st.sampled_from(KINDS)),
            dtype=dtype,
            rows=draw(st.sampled_from([1, 2, 3])),
            vocab=vocab,
            k=draw(st.sampled_from([k for k in (1, 2, 20, 63, 64, 65, 127, 128) if k <= vocab] + [min(vocab, 128)])),
            splits=draw(st.integers(1, 5)),
            temperature=draw(st.sampled_from([1.0, 0.7, 3.0, "per_row"])),
            gap=draw(st.sampled_from([0, 1, 3, 8, 13])),
            at_end=draw(st.booleans()),
            sampled=draw(st.sampled_from(["any", "best", "last"])),
            seed=draw(st.integers(0, 2**20)),
        )
        return replace(drawn, **fixed)

    return draw()


KINDS = (
    *("normal", "wide", "ties", "constant", "peak", "ascending", "descending", "stairs", "one_tie", "holes", "lowest"),
    *("one_finite", "few_finite"),
)
CASE = KernelCase("normal", torch.bfloat16, 2, 9001, 20, 2, 1.0, 1, True, "any", 0)


class TopkCall(ctypes.Structure):
    """As csrc/cuda/topk_logprobs.h has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "sampled_ids", "row_temperature")),
        *((name, ctypes.c_void_p) for name in ("partial_values", "partial_ids", "partial_stats")),
        *((name, ctypes.c_void_p) for name in ("ids", "logprobs", "sampled_logprobs", "lse")),
        ("dtype", ctypes.c_int),
        ("n", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("k", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("temperature", ctypes.c_float),
        ("stride_logits_n", ctypes.c_int64),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernel with")
    folder, emulator, source = tmp_path_factory.mktemp("emulator"), ROOT / "tests" / "cuda_emulator", ROOT / "csrc" / "cuda"
    command = [compiler, *FLAGS, f"-I{emulator}", f"-I{source}", "-x", "c++"]
    command += [str(source / "topk_logprobs.cu"), str(emulator / "topk_driver.cpp"), "-o", str(folder / "topk.so")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(folder / "topk.so"))
    loaded.emulate_topk_logprobs.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena(128)


@pytest.fixture(scope="module")
def launch(library: ctypes.CDLL) -> Launch:
    def run(
        logits: Tensor,
        sampled_ids: Tensor,
        k: int,
        temperature: float | Tensor = 1.0,
        *,
        splits: int = 1,
        seed: int = 0,
        only_grid: bool = False,
    ) -> dict[str, Tensor]:
        n, vocab = logits.shape
        shapes = {
            "partial_values": (n, splits, k),
            "partial_ids": (n, splits, k),
            "partial_stats": (n, splits, 2),
            "ids": (n, k + 1),
            "logprobs": (n, k + 1),
            "sampled_logprobs": (n,),
            "lse": (n,),
        }
        types = {"partial_ids": torch.int32, "ids": torch.int64}
        poison = {torch.float32: torch.nan, torch.int32: -77, torch.int64: -77}
        guarded, inner = {}, {}
        for name, shape in shapes.items():
            dtype = types.get(name, torch.float32)
            count = torch.Size(shape).numel()
            guarded[name] = torch.full((count + 2 * GUARD,), 12345, dtype=dtype)
            inner[name] = guarded[name][GUARD:-GUARD].fill_(poison[dtype]).view(shape)
        row_temperature = temperature if isinstance(temperature, Tensor) else None
        pointers = [None if x is None else x.data_ptr() for x in (logits, sampled_ids, row_temperature)]
        scalar = 1.0 if isinstance(temperature, Tensor) else temperature
        call = TopkCall(
            *pointers, *(x.data_ptr() for x in inner.values()), DTYPES[logits.dtype], n, vocab, k, splits, scalar,
            logits.stride(0),
        )  # fmt: skip
        message = library.emulate_topk_logprobs(ctypes.c_uint(seed), ctypes.c_int(only_grid), ctypes.byref(call))
        if message is not None:
            raise RuntimeError(message.decode())
        for name, memory in guarded.items():
            assert (memory[:GUARD] == 12345).all(), f"wrote before {name}"
            assert (memory[-GUARD:] == 12345).all(), f"wrote behind {name}"
        assert only_grid or (inner["ids"] != -77).all()
        return inner

    return run


def launch_case(case: KernelCase, launch: Launch, arena: Arena, seed: int = 0) -> dict[str, Tensor]:
    logits = arena.place(case.logits(), case.vocab + case.gap, case.at_end)
    return launch(logits, case.sampled_ids(logits), case.k, case.row_temperature(), splits=case.splits, seed=seed)


def check(case: KernelCase, out: dict[str, Tensor]) -> None:
    logits, temperature = case.logits(), case.row_temperature()
    sampled_ids = case.sampled_ids(logits)
    in_torch, exact = (
        topk_logprobs(logits.to(dtype), sampled_ids, case.k, temperature=temperature, backend="reference")
        for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(out["ids"], in_torch.ids)
    # Rounding in float32 may order, and so choose, differently than in float64: compared where the choice is the same.
    same = (in_torch.ids == exact.ids).all(1)
    z = logits.double() / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    largest = z.where(z > torch.finfo(case.dtype).min / 8, 0.0).abs().max().item()
    for name in ("logprobs", "sampled_logprobs", "lse"):
        rows = same if name == "logprobs" else slice(None)
        value, theirs, truth = out[name][rows], getattr(in_torch, name)[rows], getattr(exact, name)[rows]
        # -3e38 over a temperature is -inf in float32.
        truth = torch.where(truth < -torch.finfo(torch.float32).max, -torch.inf, truth)
        keep = truth.abs() < 1e30
        assert torch.equal(value[~keep], theirs[~keep])
        assert_as_exact_as_torch(name, value[keep], theirs[keep], truth[keep], largest=largest)


@given(case=kernel_cases())
@example(case=CASE)
@example(case=replace(CASE, dtype=torch.float32, vocab=4099, k=128, kind="ascending"))
@example(case=replace(CASE, dtype=torch.float16, vocab=128, k=128, kind="ties"))
@example(case=replace(CASE, kind="ties", k=128, splits=5))
@example(case=replace(CASE, kind="stairs", k=100, temperature=0.7))
@example(case=replace(CASE, kind="few_finite", k=128, splits=3, vocab=300))
@settings(max_examples=60)
def test_as_the_reference_says(launch: Launch, arena: Arena, case: KernelCase) -> None:
    check(case, launch_case(case, launch, arena))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind(launch: Launch, arena: Arena, kind: str, dtype: torch.dtype) -> None:
    case = replace(CASE, kind=kind, dtype=dtype, vocab=2 * TILE[dtype] + 77, k=40, temperature="per_row")
    check(case, launch_case(case, launch, arena))


def test_ties_made_by_rounding_go_to_the_lowest_id(launch: Launch) -> None:
    """Neighbouring floats whose quotients are the same float: larger logits with higher ids must not win."""
    logits = 1.75 + torch.arange(601)[None] * 2.0**-23
    assert (logits / 1.2).unique().numel() < 520
    ids = torch.tensor([3])
    for temperature in (1.2, torch.tensor([1.2])):
        out = launch(logits, ids, 50, temperature)
        assert torch.equal(out["ids"], topk_logprobs(logits, ids, 50, temperature=temperature, backend="reference").ids)


@pytest.mark.parametrize("temperature", [0.7, 1.2, 3.0, 7e-3, 900.0])
@pytest.mark.parametrize(("start", "step"), [(1.5, 2.0**-23), (-1.5, 2.0**-23), (0.0, 2.0**-149), (-(2.0**-139), 2.0**-149)])
def test_one_step_above_the_threshold_is_enough(launch: Launch, temperature: float, start: float, step: float) -> None:
    """Logits rise by one float every hundred ids, so that what comes is the least that must not be filtered out."""
    logits = (start + (torch.arange(3 * 2048) // 100).double() * step).float()[None]
    ids = torch.tensor([3])
    expected = topk_logprobs(logits, ids, 50, temperature=temperature, backend="reference")
    assert torch.equal(launch(logits, ids, 50, temperature)["ids"], expected.ids)


@given(case=kernel_cases(), seeds=st.lists(st.integers(1, 2**31), min_size=2, max_size=2))
@example(case=replace(CASE, kind="ties", k=128, splits=5), seeds=[1, 2])
@settings(max_examples=15)
def test_no_order_of_threads_changes_a_bit(launch: Launch, arena: Arena, case: KernelCase, seeds: list[int]) -> None:
    first, *others = (launch_case(case, launch, arena, seed) for seed in seeds)
    for other in others:
        assert all(bit_equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_without_a_finite_maximum_are_flagged_and_spare_the_others(
    launch: Launch, arena: Arena, dtype: torch.dtype, poison: float, temperature: float
) -> None:
    logits = replace(CASE, dtype=dtype, rows=8).logits()
    for row, column in ((1, 0), (2, 8999), (3, 4500)):
        logits[row, column] = poison
    logits[4], logits[5] = poison, -torch.inf
    logits[6, ::2] = poison
    placed = arena.place(logits, 9003, True)
    ids = torch.arange(8)
    for splits in (1, 3):
        out = launch(placed, ids, 100, temperature, splits=splits)
        assert out["lse"].isfinite().tolist() == [True, False, False, False, False, False, False, True]
        good = [0, 7]
        expected = topk_logprobs(logits[good], ids[good], 100, temperature=temperature, backend="reference")
        assert torch.equal(out["ids"][good], expected.ids)


@pytest.mark.parametrize("bad", [-1, -(2**40), 300, 2**31, 2**33 + 5])
def test_sampled_ids_out_of_range_are_not_read(launch: Launch, arena: Arena, bad: int) -> None:
    logits = arena.place(torch.randn(2, 300), 300, True)
    out = launch(logits, torch.tensor([5, bad]), 8)
    assert out["sampled_logprobs"].isnan().tolist() == [False, True]
    assert out["logprobs"][:, :8].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_end", [False, True])
def test_every_alignment_of_a_row(launch: Launch, arena: Arena, dtype: torch.dtype, at_end: bool) -> None:
    """A stride of vocab + 1 puts consecutive rows at all 8 places of a vector; small rows lie within one."""
    for vocab in (1, 5, 16, 2047):
        case = replace(CASE, dtype=dtype, rows=9, vocab=vocab, k=min(vocab, 5), gap=(8 - vocab) % 8 + 1, at_end=at_end)
        check(case, launch_case(case, launch, arena))


def test_large_vocabularies_keep_six_digits(launch: Launch) -> None:
    """3e-6 of float64 for |z| <= 16 at V = 151936, where equal terms would all round the same way."""
    g = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.full((151936,), 15.0), (torch.randn(151936, generator=g) * 4).clamp(-16, 16)])
    logits[0, 70000] = 16.0
    ids = torch.tensor([1, 2])
    for splits in (1, 18):
        out = launch(logits, ids, 20, splits=splits)
        exact = topk_logprobs(logits.double(), ids, 20, backend="reference")
        assert torch.equal(out["ids"], exact.ids)
        for name in ("logprobs", "sampled_logprobs", "lse"):
            assert (out[name] - getattr(exact, name)).abs().max() <= 3e-6, name


def test_equal_terms_do_not_drift(launch: Launch) -> None:
    """Added up without compensation, five hundred tiles of equal terms that round the same way would be 7e-6 off."""
    logits = torch.tensor([[13.041708], [13.160804], [10.421608], [15.383920]]).repeat(1, 1 << 20)
    logits[:, 70000] = 16.0
    lse = launch(logits, torch.tensor([1, 1, 1, 1]), 20)["lse"]
    assert (lse - logits.double().logsumexp(1)).abs().max() <= 2e-6  # half a unit in the last place of lse is 1e-6


@pytest.mark.parametrize("kind", ["ascending", "descending", "normal", "ties", "few_finite"])
def test_as_many_splits_as_there_can_be(launch: Launch, arena: Arena, kind: str) -> None:
    """32 lists of 128, from segments that are empty, or hold all of the best."""
    case = replace(CASE, kind=kind, dtype=torch.float32, rows=1, vocab=36 * 2048 - 5, k=128, splits=32)
    check(case, launch_case(case, launch, arena))


def test_rows_are_not_on_a_grid_dimension_of_65535(launch: Launch) -> None:
    launch(torch.zeros(1, 1).expand(70000, 1), torch.zeros(70000, dtype=torch.int64), 1, only_grid=True)


@pytest.mark.parametrize(
    ("k", "splits", "message"),
    [(0, 1, "k must be"), (129, 1, "k must be"), (9, 1, "k must be"), (1, 0, "splits"), (1, 33, "splits")],
)
def test_what_cannot_be_launched_says_so(launch: Launch, k: int, splits: int, message: str) -> None:
    vocab = 200 if k > 100 else 8
    with pytest.raises(RuntimeError, match=message):
        launch(torch.zeros(1, vocab), torch.zeros(1, dtype=torch.int64), k, splits=splits)


def test_splits() -> None:
    h200 = 132
    assert pick_topk_splits(4096, 151936, h200) == 1
    assert pick_topk_splits(1, 151936, h200) == pick_topk_splits(64, 151936, h200) == 18
    assert pick_topk_splits(1, 10**7, h200) == TOPK_MAX_SPLITS
    assert pick_topk_splits(0, 151936, h200) >= 1
    for n in (1, 3, 64, 500, 1000, 3000, 10**6):
        for vocab in (1, 8191, 32000, 151936, 2**31 - 1):
            splits = pick_topk_splits(n, vocab, h200)
            assert 1 <= splits <= TOPK_MAX_SPLITS
            assert splits == 1 or vocab // splits >= TOPK_MIN_SEGMENT
            assert splits <= pick_topk_splits(max(1, n // 2), vocab, h200)
