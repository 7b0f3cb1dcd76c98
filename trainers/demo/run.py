"""The demo's runs: one warm-up per seed, then each method from the same weights, with real staleness."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback

from dppo_kernels.trainers._trl_seam import GRPOConfig, GRPOTrainer
from dppo_kernels.trainers.demo import report
from dppo_kernels.trainers.demo.task import (
    MAX_ANSWER_TOKENS,
    VerifiedAnswer,
    build_tokenizer,
    careless_examples,
    split_problems,
)
from dppo_kernels.trainers.demo.warmup import STEPS, build_model, greedy_accuracy, warm_up
from dppo_kernels.trainers.dppo import DPPOConfig, DPPOTrainer

# Name -> (trainer, config, settings of the method). Everything else is shared.
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "GRPO clip": (GRPOTrainer, GRPOConfig, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    # Tokens without an advantage are scored too: the entropy that is plotted is that of all tokens, as GRPO's is.
    "DPPO binary-TV": (DPPOTrainer, DPPOConfig, {"divergence_type": "binary_tv", "score_inactive": True}),
    "DPPO top-K-TV": (
        DPPOTrainer,
        DPPOConfig,
        {"divergence_type": "topk_tv", "divergence_topk": 4, "score_inactive": True},
    ),
}


@dataclass
class DemoConfig:
    """Options of ``dppo demo``."""

    output_dir: str = field(
        default="outputs/demo", metadata={"help": "Where TensorBoard logs, the figure and results.json go."}
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds; each has its own warm-up and runs."})
    steps: int = field(default=160, metadata={"help": "Optimiser steps of each reinforcement-learning run."})
    warmup_steps: int = field(default=STEPS, metadata={"help": "Supervised steps before it."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Any of {', '.join(METHODS)}."})
    shuffle_rewards: bool = field(default=False, metadata={"help": "Control: deal the rewards out at random."})

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"`methods` must be among {', '.join(map(repr, METHODS))}; got {name!r}")
        for name in ("seeds", "steps", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")


@dataclass
class RunResult:
    """One method on one seed."""

    method: str
    seed: int
    accuracy_before: float  # greedy, held-out
    accuracy_after: float
    seconds: float
    history: list[dict[str, float]]  # logged metrics, one entry a step


def run_demo(config: DemoConfig) -> list[RunResult]:
    """Train a small model on verified addition, offline and on this CPU: GRPO's clipping against DPPO's trust region.

    Prints held-out accuracy before and after, writes TensorBoard logs, results.json and one figure to `output_dir`.
    """
    console, out = Console(), Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    training, held_out = split_problems()
    data = Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in training])
    report.introduce(console, len(training), len(held_out), config)
    results = []
    for seed in range(config.seeds):
        set_seed(seed)
        model = build_model(tokenizer, seed)
        with _progress(console, f"seed {seed}  warm-up", config.warmup_steps) as advance:
            warm_up(
                model,
                tokenizer,
                careless_examples(training, seed),
                seed=seed,
                steps=config.warmup_steps,
                on_step=lambda step, loss: advance(step, f"loss {loss:.2f}"),
            )
        start = {name: p.clone() for name, p in model.state_dict().items()}
        before = greedy_accuracy(model, tokenizer, held_out)
        for method in config.methods:
            model = build_model(tokenizer, seed)
            model.load_state_dict(start)
            with _progress(console, f"seed {seed}  {method}", config.steps) as advance:
                trainer = _train(model, tokenizer, data, method, seed, config, out, advance)
            results.append(
                RunResult(
                    method=method,
                    seed=seed,
                    accuracy_before=before,
                    accuracy_after=greedy_accuracy(model, tokenizer, held_out),
                    seconds=trainer.state.log_history[-1]["train_runtime"],
                    history=[entry for entry in trainer.state.log_history if "reward" in entry or "entropy" in entry],
                )
            )
    (out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    report.print_table(console, results)
    figure = report.draw(results, out / "demo.png")
    console.print(f"figure   {figure}", soft_wrap=True)
    console.print(f"metrics  {out / 'results.json'}", soft_wrap=True)
    console.print(f"curves   tensorboard --logdir {out / 'tensorboard'}", soft_wrap=True)
    return results


def _train(
    model: Any,
    tokenizer: Any,
    data: Dataset,
    method: str,
    seed: int,
    config: DemoConfig,
    out: Path,
    advance: Callable[[int, str], None],
) -> Any:
    trainer_class, config_class, settings = METHODS[method]
    slug = method.lower().replace(" ", "-")
    with warnings.catch_warnings():
        # Newer transformers say `activation_checkpointing`; the old name works in all that are supported.
        warnings.simplefilter("ignore", FutureWarning)
        defaults = {
            "output_dir": str(out / "checkpoints" / f"{slug}-{seed}"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "seed": seed,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "max_steps": config.steps,
            # 128 prompts x 8 answers a rollout, used for 4 optimiser steps and twice over: half of the steps are off-policy.
            "per_device_train_batch_size": 256,
            "num_generations": 8,
            "steps_per_generation": 4,
            "num_iterations": 2,
            "max_completion_length": MAX_ANSWER_TOKENS,
            "scale_rewards": "none",
            "beta": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        arguments = config_class(**{**defaults, **settings})
        trainer = trainer_class(
            model,
            VerifiedAnswer(shuffle_seed=seed if config.shuffle_rewards else None),
            arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[
                TensorBoardCallback(SummaryWriter(str(out / "tensorboard" / f"seed{seed}" / slug))),
                _ShowProgress(advance),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


class _ShowProgress(TrainerCallback):
    def __init__(self, advance: Callable[[int, str], None]) -> None:
        self.advance, self.note = advance, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "reward" in logs:
            self.note = f"reward {logs['reward']:.2f}"
        self.advance(state.global_step, self.note)


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda step, note: progress.update(task, completed=step, note=note)
