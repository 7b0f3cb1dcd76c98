"""``dppo train``: a trainer of this package on prompts with checkable answers, from flags and a YAML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from trl import ModelConfig, get_peft_config, get_quantization_config

from dppo_kernels.trainers.arguments import (
    NO_REWARD,
    ArgumentParser,
    DataArguments,
    as_chat,
    shipped_configs,
    with_shipped_config,
)
from dppo_kernels.trainers.dapo import DAPOConfig, DAPOTrainer
from dppo_kernels.trainers.data import split_problems
from dppo_kernels.trainers.decoupled_ppo import DecoupledPPOTrainer
from dppo_kernels.trainers.demo.offline import EXPERT_STEPS, OFFLINE_MODEL, WARMUP_STEPS, build_offline_model
from dppo_kernels.trainers.distill_ppo import DistillPPOTrainer
from dppo_kernels.trainers.distill_ppo_config import DistillPPOConfig
from dppo_kernels.trainers.dppo import DPPOConfig, DPPOTrainer
from dppo_kernels.trainers.ppo import PPOTrainer
from dppo_kernels.trainers.ppo_config import DecoupledPPOConfig, PPOConfig
from dppo_kernels.trainers.sharding import unpartitioned

ALGORITHMS: dict[str, tuple[type[Any], type[Any]]] = {
    "dapo": (DAPOConfig, DAPOTrainer),
    "decoupled-ppo": (DecoupledPPOConfig, DecoupledPPOTrainer),
    "distill-ppo": (DistillPPOConfig, DistillPPOTrainer),
    "dppo": (DPPOConfig, DPPOTrainer),
    "ppo": (PPOConfig, PPOTrainer),
}
EVAL_ACCURACY = "eval_answers/correct"


@dataclass
class TrainArguments(DataArguments):
    """`DataArguments` with what only training needs.

    Args:
        eval_size: hold out so many prompts for evaluation.
        offline_warmup_steps: supervised steps of the model that `model_name_or_path: offline` makes.
    """

    eval_size: int = field(default=0, metadata={"help": "Hold out so many prompts for evaluation."})
    offline_warmup_steps: int = field(default=WARMUP_STEPS, metadata={"help": "Of the model 'offline': supervised steps."})

    def __post_init__(self) -> None:
        if self.eval_size < 0:
            raise ValueError(f"`eval_size` must not be negative, got {self.eval_size}")
        if self.offline_warmup_steps < 1:
            raise ValueError(f"`offline_warmup_steps` must be at least 1, got {self.offline_warmup_steps}")


@dataclass
class PPOTrainArguments(TrainArguments):
    """`TrainArguments` with the models of PPO.

    Args:
        reward_model_path: a sequence classification model with one label, which is one more reward.
        value_model_path: a token or sequence classification model with one label. Default: a copy of the policy's backbone.
        ref_model_path: what the KL is against. Default: the policy as it was at first.
    """

    reward_model_path: str | None = field(default=None, metadata={"help": "Sequence classification model: one more reward."})
    value_model_path: str | None = field(default=None, metadata={"help": "Classification model (default: like the policy)."})
    ref_model_path: str | None = field(default=None, metadata={"help": "What the KL is against (default: the policy)."})

    def models(self) -> dict[str, str | None]:
        """Arguments of the trainer."""
        return {"reward_model": self.reward_model_path, "value_model": self.value_model_path, "ref_model": self.ref_model_path}


@dataclass
class DistillTrainArguments(PPOTrainArguments):
    """`PPOTrainArguments` with a teacher.

    Args:
        teacher_model_path: a causal LM over the tokens of the one that is trained, or "offline": a wider model that imitated
            right answers, made like the offline model. Needed.
        offline_teacher_steps: supervised steps of the teacher that "offline" makes.
    """

    teacher_model_path: str | None = field(default=None, metadata={"help": "A causal LM, or 'offline'. Needed."})
    offline_teacher_steps: int = field(default=EXPERT_STEPS, metadata={"help": "Of the teacher 'offline': supervised steps."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offline_teacher_steps < 1:
            raise ValueError(f"`offline_teacher_steps` must be at least 1, got {self.offline_teacher_steps}")

    def models(self) -> dict[str, str | None]:
        return {**super().models(), "teacher": self.teacher_model_path}


def parse(algorithm: str, arguments: Sequence[str]) -> tuple[TrainArguments, Any, ModelConfig]:
    """Data, trainer and model settings from flags and ``--config``, which names a YAML file or a shipped one.

    Exits with status 2, as argparse does, where they are not understood.
    """
    config_class, _ = ALGORITHMS[algorithm]
    arguments_class: type[TrainArguments] = PPOTrainArguments if issubclass(config_class, PPOConfig) else TrainArguments
    if issubclass(config_class, DistillPPOConfig):
        arguments_class = DistillTrainArguments
    names = shipped_configs(algorithm)
    description = f"Options of TRL's GRPOConfig and ModelConfig work too. Shipped for --config: {', '.join(names)}."
    parser = ArgumentParser(
        (arguments_class, config_class, ModelConfig), prog=f"dppo train {algorithm}", description=description
    )
    data, config, model = parse_with_config(parser, arguments, names)
    if model.model_name_or_path is None:
        parser.error("--model_name_or_path is needed: a folder, a hub id or 'offline'")
    if isinstance(data, DistillTrainArguments) and data.teacher_model_path is None:
        parser.error("--teacher_model_path is needed: a folder, a hub id or 'offline'")
    if config.eval_strategy != "no" and not data.eval_size:
        parser.error(f"--eval_strategy {config.eval_strategy.value} needs --eval_size")
    if config.eval_strategy == "no" and data.eval_size:
        parser.error(f"--eval_size {data.eval_size} takes prompts out of training: it needs --eval_strategy")
    has_reward_model = isinstance(data, PPOTrainArguments) and data.reward_model_path is not None
    if NO_REWARD in data.reward_funcs and (len(data.reward_funcs) > 1 or not has_reward_model):
        parser.error(f"--reward_funcs {NO_REWARD} stands alone and needs a --reward_model_path, which PPO takes")
    return data, config, model


def parse_with_config(parser: ArgumentParser, arguments: Sequence[str], names: Mapping[str, Path]) -> tuple[Any, ...]:
    """The parser's dataclasses from flags and ``--config``, which names a YAML file or one of the shipped `names`."""
    try:
        parsed: tuple[Any, ...] = parser.parse_args_and_config(with_shipped_config(parser, arguments, names))
    except (TypeError, ValueError) as reason:
        parser.error(str(reason))
    return parsed


def train(algorithm: str, arguments: Sequence[str]) -> Any:
    """Train as told; the model goes to `output_dir`. Returns the trainer."""
    data_args, config, model_args = parse(algorithm, arguments)
    rewards = data_args.rewards()
    with config.main_process_first(desc="loading prompts"):
        prompts = data_args.prompts(with_answers=bool(rewards))
    held_out = None
    if data_args.eval_size:
        prompts, held_out = split_problems(prompts, data_args.eval_size, seed=config.seed)
    resume = resume_from(config.resume_from_checkpoint)
    model, models = model_args.model_name_or_path, data_args.models() if isinstance(data_args, PPOTrainArguments) else {}
    if model == OFFLINE_MODEL:
        model = offline_model("start", config, resume, prompts, data_args.offline_warmup_steps)
    if isinstance(data_args, DistillTrainArguments) and data_args.teacher_model_path == OFFLINE_MODEL:
        models["teacher"] = offline_model("teacher", config, resume, prompts, data_args.offline_teacher_steps, expert=True)
    if data_args.as_chat:
        prompts = prompts.map(as_chat)
        held_out = held_out and held_out.map(as_chat)
    config.model_init_kwargs = {**init_arguments(model_args), **(config.model_init_kwargs or {})}
    _, trainer_class = ALGORITHMS[algorithm]
    trainer = trainer_class(
        model,
        rewards,
        config,
        train_dataset=prompts,
        eval_dataset=held_out if config.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        **models,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(config.output_dir)
    accuracy = [entry[EVAL_ACCURACY] for entry in trainer.state.log_history if EVAL_ACCURACY in entry]
    say_results(trainer, "held-out answers that are right", accuracy, ".1%")
    return trainer


def say_results(trainer: Any, measured: str, values: Sequence[float], form: str) -> None:
    """The first and the last value of what was measured, and where model and curves are."""
    say, folder = trainer.accelerator.print, trainer.args.output_dir
    if len(values) > 1:
        say(f"{measured}: {values[0]:{form}} first, {values[-1]:{form}} last")
    say(f"model    {folder}")
    if "tensorboard" in trainer.args.report_to:
        say(f"curves   tensorboard --logdir {folder}")


def init_arguments(model: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` is told of the model."""
    return {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}


def resume_from(value: str | None) -> str | bool | None:
    return {"true": True, "false": None}.get(value.lower(), value) if isinstance(value, str) else value


def offline_model(name: str, config: Any, resume: Any, prompts: Any, steps: int, expert: bool = False) -> str:
    """Where the first process makes it, unless a run that is resumed did."""
    folder = Path(config.output_dir) / name
    with config.main_process_first(desc="making the offline model"):
        if config.process_index == 0 and not resume:
            with unpartitioned():
                _make_offline_model(folder, prompts, config.seed, steps, expert)
    return str(folder)


def _make_offline_model(folder: Path, prompts: Any, seed: int, steps: int, expert: bool) -> None:
    texts = prompts["prompt"][:]
    if not isinstance(texts[0], str):
        option = "teacher_model_path" if expert else "model_name_or_path"
        raise ValueError(f"`{option}`={OFFLINE_MODEL!r} is for generated sets, got chats")
    title = "a wider model imitates right answers" if expert else "a small model imitates a careless teacher"
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task("", total=steps)
        build_offline_model(
            folder,
            texts,
            prompts["answer"][:],
            seed=seed,
            steps=steps,
            expert=expert,
            on_step=lambda step, loss: progress.update(task, completed=step),
        )
