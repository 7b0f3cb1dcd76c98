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
from dppo_kernels.trainers.dapo import DAPOConfig, DAPOTrainer
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

NO_LIMIT = 1_000_000
EVALUATE_EVERY = 8  # optimiser steps, all that a rollout is used for

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
    "GRPO": (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", "epsilon": 0.2, "scale_rewards": "group"}),
    "DAPO": (
        DAPOTrainer,
        DAPOConfig,
        {"filter_groups_enable": True, "filter_exhausted": "train", "scale_rewards": "group", "score_inactive": True},
    ),
}
DEFAULT_METHODS = ("GRPO clip", "DPPO binary-TV", "DPPO top-K-TV")


@dataclass
class DemoConfig:
    """Options of ``dppo demo``."""

    output_dir: str = field(
        default="outputs/demo", metadata={"help": "Where TensorBoard logs, the figure and results.json go."}
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds; each has its own warm-up and runs."})
    steps: int = field(default=160, metadata={"help": "Optimiser steps of each reinforcement-learning run."})
    tokens: int | None = field(default=None, metadata={"help": "End each run by tokens it generated, not by `steps`."})
    warmup_steps: int = field(default=STEPS, metadata={"help": "Supervised steps before it."})
    methods: list[str] = field(
        default_factory=lambda: list(DEFAULT_METHODS), metadata={"help": f"Any of {', '.join(METHODS)}."}
    )
    shuffle_rewards: bool = field(default=False, metadata={"help": "Control: deal the rewards out at random."})

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"`methods` must be among {', '.join(map(repr, METHODS))}; got {name!r}")
        for name in ("seeds", "steps", "tokens", "warmup_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")


@dataclass
class RunResult:
    """One method on one seed."""

    method: str
    seed: int
    accuracy_before: float  # greedy, held-out
    accuracy_after: float
    seconds: float
    tokens: int  # generated
    history: list[dict[str, float]]  # logged metrics, one entry a step; "tokens" generated so far, and "accuracy" on held-out


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
            watch = _Watch(config, lambda: greedy_accuracy(model, tokenizer, held_out))  # noqa: B023  (used in this turn only)
            with _progress(console, f"seed {seed}  {method}", config.tokens or config.steps) as advance:
                watch.advance = advance
                trainer = _train(model, tokenizer, data, method, seed, config, out, watch)
            results.append(
                RunResult(
                    method=method,
                    seed=seed,
                    accuracy_before=before,
                    accuracy_after=greedy_accuracy(model, tokenizer, held_out),
                    seconds=trainer.state.log_history[-1]["train_runtime"],
                    tokens=watch.tokens,
                    history=[entry for entry in trainer.state.log_history if "reward" in entry or "entropy" in entry],
                )
            )
    (out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    report.print_table(console, results)
    figure = report.draw(results, out / "demo.png", by_tokens=config.tokens is not None)
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
    watch: "_Watch",
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
            "max_steps": config.steps if config.tokens is None else NO_LIMIT,
            # 128 prompts x 8 answers a rollout, used for 4 optimiser steps and twice over: half of the steps are off-policy.
            "per_device_train_batch_size": 256,
            "gradient_accumulation_steps": 1,
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
        watch.reward = VerifiedAnswer(shuffle_seed=seed if config.shuffle_rewards else None)
        trainer = trainer_class(
            model,
            watch.reward,
            arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[
                TensorBoardCallback(SummaryWriter(str(out / "tensorboard" / f"seed{seed}" / slug))),
                watch,
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


class _Watch(TrainerCallback):
    """Shows progress, measures accuracy between rollouts, and ends a run that has generated its tokens."""

    reward: VerifiedAnswer
    advance: Callable[[int, str], None]

    def __init__(self, config: DemoConfig, accuracy: Callable[[], float]) -> None:
        self.config, self.accuracy, self.note = config, accuracy, ""

    @property
    def tokens(self) -> int:
        return self.reward.tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        budget = self.config.tokens
        if budget is not None and self.tokens >= budget and state.global_step % EVALUATE_EVERY == 0:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "reward" in logs:
            self.note = f"reward {logs['reward']:.2f}"
        if "entropy" in logs:
            entry = state.log_history[-1]
            entry["tokens"] = self.tokens
            if self.config.tokens is not None and state.global_step % EVALUATE_EVERY == 0:
                entry["accuracy"] = self.accuracy()
        done = state.global_step if self.config.tokens is None else min(self.tokens, self.config.tokens)
        self.advance(done, self.note)


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda step, note: progress.update(task, completed=step, note=note)
