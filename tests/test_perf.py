"""Speed gates on this machine: nine paired rounds, median of the ratios, best of three tries. ``make perf``."""

import pytest
import torch

from benchmarks.cases import OURS, load
from benchmarks.harness import paired_rounds, ratio
from benchmarks.run import timed
from benchmarks.shapes import CPU_SHAPES

pytest.importorskip("trl", reason="compares with TRL's kernels")

# Peer time / our time that must be reached.
GATES = {
    ("C1", "forward"): 1.2,
    ("C1", "forward+backward"): 1.2,
    ("C2", "forward+backward"): 1.1,
    ("C3", "forward+backward"): 1.5,
}


@pytest.mark.perf
@pytest.mark.parametrize(("shape", "mode"), GATES)
def test_linear_logprobs_is_faster_than_trl_on_cpu(shape: str, mode: str) -> None:
    case, device = load("linear_logprobs"), torch.device("cpu")
    x = case.inputs(CPU_SHAPES[shape], torch.float32, device)
    contenders = {name: timed(case, name, x, mode) for name in (OURS, "trl")}
    tries = []
    for _ in range(3):
        tries.append(ratio(paired_rounds(contenders, 9, device), "trl", OURS))
        if tries[-1] >= GATES[shape, mode]:
            break
    print(f"{shape} {mode}: TRL takes {max(tries):.2f}x our time")
    assert max(tries) >= GATES[shape, mode], tries
