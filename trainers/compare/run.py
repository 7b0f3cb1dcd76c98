"""The runs: by seed a warm start, then rounds in which both methods face the same discriminators, then the measures."""

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dppo_kernels
from dppo_kernels.trainers.compare.config import WARM_START, CompareConfig
from dppo_kernels.trainers.compare.measure import fit_judge, fit_training, judged, measure, real_rows, rewards
from dppo_kernels.trainers.compare.methods import RUNS, quiet
from dppo_kernels.trainers.compare.task import Samples, Task
from dppo_kernels.trainers.rewards.tabular import HierarchicalReward
from dppo_kernels.trainers.tabular import Evaluator, validity

# Places of sampling beyond every round: for the final measures, and for what discriminators learn from.
FINAL, LEARNED = 1_000_000, 2_000_000
PACKAGES = ("dppo-kernels", "torch", "transformers", "trl", "scikit-learn", "scipy", "pandas")
LEADER = "PPO"  # generates whole rollouts; the others follow up to its tokens
# They say where results go and how many there are; the rest determines a seed's.
_NOT_FINGERPRINTED = ("output_dir", "seeds")

Note = Callable[[str], None]


class WarmStartError(ValueError):
    """The warm start writes nothing that could be rewarded."""


def run_seeds(config: CompareConfig, note: Note = lambda text: None) -> list[dict[str, Any]]:
    """Results of every seed. A seed that is done is in a file of its own, and is not run again with the same options."""
    folder = Path(config.output_dir) / "seeds"
    folder.mkdir(parents=True, exist_ok=True)
    print_, results = fingerprint(config), []
    for seed in range(config.seeds):
        path = folder / f"seed-{seed}.json"
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if stored.get("fingerprint") != print_:
            with quiet():
                stored = {"fingerprint": print_, "result": run_seed(config, seed, note)}
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(stored, indent=1))
            unfinished.replace(path)
        else:
            note(f"seed {seed}: taken from {path}")
        results.append(stored["result"])
    return results


def fingerprint(config: CompareConfig) -> dict[str, Any]:
    """What a seed's results depend on."""
    options = {name: value for name, value in asdict(config).items() if name not in _NOT_FINGERPRINTED}
    path = Path(config.data)
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {**options, "content": content, "versions": versions()}


def versions() -> dict[str, str]:
    """Of all that a seed's results depend on: this package's by a hash of its sources, whatever they are called."""
    code = hashlib.sha256()
    folders = {Path(dppo_kernels.__file__).parent, Path(__file__).parents[1]}  # in a checkout the trainers lie elsewhere
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        code.update(path.read_bytes())
    packages = {name: version(name) for name in PACKAGES}
    return {"sources": code.hexdigest()[:12], "python": platform.python_version(), **packages}


def commit() -> str | None:
    """Of the checkout that this runs from, if it is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an environment inside another project's repository
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def run_seed(config: CompareConfig, seed: int, note: Note = lambda text: None) -> dict[str, Any]:
    """One seed: measures of the warm start and of each method, curves, tokens, time and memory; numbers that JSON holds.

    Raises:
        WarmStartError: a ValueError.
    """
    started = time.perf_counter()
    task = Task.build(config, seed)
    start = task.warm_start(config.warmup_steps, _every(config.warmup_steps, f"seed {seed}: warm start", note))
    learned = task.sample(start, config.eval_samples, LEARNED)
    first = task.sample(start, config.eval_samples, 0)
    if not any(validity(task.schema, text) for text in first.texts):
        raise WarmStartError(
            f"`warmup_steps`={config.warmup_steps} must teach a model of `width`={config.width} to write whole rows, got none "
            f"in {config.eval_samples} completions of seed {seed}: all would have the reward 0"
        )
    discriminators = fit_training(task, config, learned)
    reward = HierarchicalReward(discriminators)  # one object for both: `update` changes what it says
    runs = {name: make(task, config, Path(config.output_dir) / "trainers", start) for name, make in RUNS.items()}
    samples = dict.fromkeys(runs, first)
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    drawn: dict[str, list[Samples]] = {name: [first] for name in runs}
    reports = [discriminators.report()]
    for index in range(config.rounds):
        if index:
            # Samples of their own: rewards are measured on others, which no discriminator has learned from.
            theirs = [task.sample(run.weights, config.eval_samples, LEARNED + index).texts for run in runs.values()]
            discriminators.update([text for texts in theirs for text in texts], seed=seed + index * 1009)
            reports.append(discriminators.report())
        tokens = None
        for name in sorted(runs, key=lambda name: name != LEADER):
            run = runs[name]
            logged = run.round(index, reward, tokens)
            tokens = tokens or run.tokens
            before, samples[name] = samples[name], task.sample(run.weights, config.eval_samples, index + 1)
            drawn[name].append(samples[name])
            kl = task.kl(samples[name], run.weights, start)
            curves[name].append(
                {
                    "round": index,
                    "generated_tokens": run.tokens,
                    "steps": run.steps,
                    "kl": float(kl.mean()),
                    "before": rewards(discriminators, before),
                    "after": rewards(discriminators, samples[name]),
                    "logged": logged,
                }
            )
            note(f"seed {seed}, round {index + 1} of {config.rounds}: {name} {_brief(curves[name][-1])}")
    shown = [task.sample(run.weights, config.eval_samples, LEARNED + config.rounds) for run in runs.values()]
    judge = fit_judge(task, config, [learned, *shown])
    for name, points in curves.items():
        for point, found in zip(points, drawn[name][1:], strict=True):
            point |= judged(judge, found)

    evaluator = Evaluator(task.schema, task.split.train, task.split.evaluation, seed=seed)

    def measured(weights: Any) -> dict[str, Any]:
        fresh = task.sample(weights, config.eval_samples, FINAL)
        return measure(task, fresh, weights, start, discriminators, judge, evaluator)

    return {
        "seed": seed,
        WARM_START: {"measures": measured(start), "curve": {"generated_tokens": 0, "kl": 0.0, **judged(judge, first)}},
        "methods": {
            name: {
                "measures": measured(run.weights),
                "generated_tokens": run.tokens,
                "steps": run.steps,
                "seconds": run.seconds,
                "peak_memory": run.peak_memory,
                "rounds": curves[name],
            }
            for name, run in runs.items()
        },
        "completion_budget": task.budget,
        "discriminators": reports,
        "judge": judge.report(),
        "real": real_rows(task, discriminators, judge),
        "commit": commit(),
        "seconds": time.perf_counter() - started,
    }


def _every(steps: int, title: str, note: Note) -> Callable[[int, float], None]:
    """Says the loss once, at the end."""
    return lambda step, loss: note(f"{title}, {steps} steps, loss {loss:.3f}") if step == steps else None


def _brief(point: dict[str, Any]) -> str:
    before, after = point["before"], point["after"]
    return (
        f"reward {before['reward']:.3f} > {after['reward']:.3f}, valid {before['validity']:.2f} > {after['validity']:.2f}, "
        f"KL {point['kl']:.2f}, {point['generated_tokens']} tokens"
    )
