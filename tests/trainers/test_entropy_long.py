"""200 steps of DPPO through the fused loss drift no further from the unfused fp32 run than its seeds from each other."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import set_seed

pytest.importorskip("matplotlib", reason="the demo extra is not installed")

from benchmarks.harness import stamp
from dppo_kernels.trainers.demo import DemoConfig
from dppo_kernels.trainers.demo import run as demo
from dppo_kernels.trainers.demo.task import build_tokenizer, careless_examples, split_problems
from dppo_kernels.trainers.demo.warmup import build_model, warm_up

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
STEPS = 200
BASE = {"divergence_type": "binary_tv", "score_inactive": True}
# Name -> (settings, seeds). Rounding to bf16 is autocast's: rows and head are rounded, products accumulate in fp32.
RUNS: dict[str, tuple[dict[str, Any], range]] = {
    "unfused, fp32": ({"fused_loss": False}, range(3)),
    "fused, fp32": ({"fused_loss": True}, range(1)),
    "fused, bf16 autocast": ({"fused_loss": True, "bf16": True}, range(1)),
}


def entropies(start: Any, tokenizer: Any, data: Dataset, name: str, seed: int, out: Path) -> torch.Tensor:
    """Mean entropy of the completion tokens at every step."""
    model = copy.deepcopy(start)
    set_seed(seed)
    trainer = demo._train(model, tokenizer, data, name, seed, DemoConfig(steps=STEPS), out, lambda step, note: None)
    return torch.tensor([entry["entropy"] for entry in trainer.state.log_history if "entropy" in entry])


def draw(curves: dict[str, list[torch.Tensor]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for i, (name, runs) in enumerate(curves.items()):
        for j, run in enumerate(runs):
            axis.plot(run, color=f"C{i}", alpha=0.8, linewidth=1.1, label=None if j else f"{name} ({len(runs)} seeds)")
    axis.set(xlabel="optimiser step", ylabel="entropy (nats)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@pytest.mark.long
def test_the_fused_loss_does_not_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = ", ".join(f"{name} {value}" for name, value in stamp(torch.device("cpu")).items())
    methods = {name: (demo.DPPOTrainer, demo.DPPOConfig, {**BASE, **settings}) for name, (settings, _) in RUNS.items()}
    monkeypatch.setattr(demo, "METHODS", methods)
    tokenizer = build_tokenizer()
    training, _ = split_problems()
    data = Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in training])
    start = build_model(tokenizer, 0)
    warm_up(start, tokenizer, careless_examples(training, 0), seed=0)
    curves: dict[str, list[torch.Tensor]] = {}
    for name, (_, seeds) in RUNS.items():
        curves[name] = [entropies(start, tokenizer, data, name, seed, tmp_path) for seed in seeds]
    reference = torch.stack(curves["unfused, fp32"])
    deviation = reference.mean(1).std().item()
    gaps = {name: (runs[0] - reference[0]).mean().item() for name, runs in curves.items() if name != "unfused, fp32"}
    RESULTS.mkdir(parents=True, exist_ok=True)
    draw(curves, RESULTS / "entropy.png")
    rows = [f"| unfused, fp32 | {seed} | {run.mean():.4f} | |" for seed, run in enumerate(reference)]
    rows += [f"| {name} | 0 | {curves[name][0].mean():.4f} | {gap:+.4f} |" for name, gap in gaps.items()]
    (RESULTS / "entropy.md").write_text(
        "# Entropy over 200 steps, fused and unfused\n\n"
        f"`make long` ({facts}).\n\n"
        "DPPO binary-TV on the demo's task, all runs from the same warmed-up weights. Mean over steps of the mean entropy of\n"
        "the completion tokens, and the gap to the unfused fp32 run of the same seed. bf16 is CPU autocast: weights stay fp32\n"
        "and are rounded where they are used.\n\n"
        "| run | seed | mean entropy (nats) | gap |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Standard deviation of the reference's mean entropy over its seeds: {deviation:.4f}; allowed gap: twice that.\n\n"
        "![entropy over steps](entropy.png)\n"
    )
    for name, gap in gaps.items():
        assert abs(gap) <= 2 * deviation, (name, gap, deviation)
