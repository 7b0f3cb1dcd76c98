"""Learning on three seeds with its control. ``make long``; writes docs/results/demo.md and its figure."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo extra is not installed")

from benchmarks.harness import stamp
from dppo_kernels.trainers.demo import DemoConfig, run_demo
from dppo_kernels.trainers.demo.run import RunResult

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
SEEDS = 3


def gain(result: RunResult) -> float:
    return 100 * (result.accuracy_after - result.accuracy_before)


def table(results: list[RunResult]) -> str:
    lines = ["| method | seed | before | after | gain | seconds |", "|---|---|---|---|---|---|"]
    for r in results:
        before, after = 100 * r.accuracy_before, 100 * r.accuracy_after
        lines.append(f"| {r.method} | {r.seed} | {before:.1f} | {after:.1f} | {gain(r):+.1f} | {r.seconds:.0f} |")
    return "\n".join(lines)


@pytest.mark.long
def test_dppo_learns_on_every_seed_and_not_from_shuffled_rewards(tmp_path) -> None:
    facts = ", ".join(f"{name} {value}" for name, value in stamp(torch.device("cpu")).items())
    learned = run_demo(DemoConfig(output_dir=str(tmp_path / "learned"), seeds=SEEDS))
    dppo = [name for name in dict.fromkeys(r.method for r in learned) if name.startswith("DPPO")]
    control = run_demo(DemoConfig(output_dir=str(tmp_path / "control"), seeds=SEEDS, methods=dppo, shuffle_rewards=True))
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "learned" / "demo.png", RESULTS / "demo.png")
    (RESULTS / "demo.md").write_text(
        "# The demo on three seeds\n\n"
        f"`make long` ({facts}). Greedy accuracy on 500 held-out problems, in %.\n\n"
        f"{table(learned)}\n\n![reward, entropy, divergence and masked share over steps](demo.png)\n\n"
        f"## Control: the same runs with shuffled rewards\n\n{table(control)}\n"
    )
    for result in learned:
        assert 0.3 <= result.accuracy_before <= 0.6, (result.method, result.seed)
        if result.method in dppo:
            assert gain(result) >= 20, (result.method, result.seed)
    for result in control:
        assert gain(result) < 5, (result.method, result.seed)
