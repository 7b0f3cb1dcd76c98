"""Options of ``dppo compare``, and what follows from them."""

from dataclasses import dataclass, field
from pathlib import Path

from dppo_kernels._checks import check_count, check_not_negative, check_positive
from dppo_kernels.trainers.pairs_config import PairsConfig

LEAST_PROMPTS = 4  # for which DPO's tokens of a round must suffice, should PPO's completions be short
HEADS = 4  # of the small model
LEVELS = ("token", "sentence", "row", "features")  # of the reward
METHODS = ("DPO", "PPO")
WARM_START = "warm start"


@dataclass
class CompareConfig:
    """Both methods' settings; what one method alone has is named after it.

    Args:
        data: "breast_cancer", or the path of a CSV file such as HELOC's.
        target: the column of classes of a CSV; HELOC's is known.
        seeds: how many; each has a split, a warm start, discriminators and one run of each method.
        rounds: of each run. Discriminators are fitted before the first and updated before each other one.
        total_steps: optimiser steps of each method, over all rounds.
        batch_size: completions that an optimiser step trains on: half as many pairs for DPO. Even.
        learning_rate: of both methods. None: `dpo_learning_rate` and `ppo_learning_rate`.
        dpo_learning_rate, ppo_learning_rate: constant.
        kl_penalty: of PPO: coefficient of the KL to the warm start.
        beta: of DPO.
        temperatures: at which DPO's pairs are sampled. PPO samples at 1.
        min_gap: between the rewards of a pair.
        ppo_epochs: passes over a rollout.
        mini_batches: optimiser steps of a pass, so that a rollout has ``batch_size * mini_batches`` completions.
        eval_samples: completions at temperature 1 that everything is measured on.
        warmup_steps: supervised steps of the warm start, on 16 rows each.
        width: of the model, a multiple of 8.
        discriminator_epochs: at most, of every level but the token level, which takes a quarter.
        output_dir: gets report.md, report.png, results.json, and a file for each seed that is done.

    Raises:
        TypeError, ValueError: an option outside what is said above.
    """

    data: str = field(default="breast_cancer", metadata={"help": "breast_cancer, or the path of a CSV file such as HELOC's."})
    target: str | None = field(default=None, metadata={"help": "Column of classes of a CSV (HELOC's is known)."})
    seeds: int = field(default=3, metadata={"help": "How many; each has its split, warm start and runs."})
    rounds: int = field(default=4, metadata={"help": "Of each run; discriminators are updated between them."})
    total_steps: int = field(default=128, metadata={"help": "Optimiser steps of each method, over all rounds."})
    batch_size: int = field(default=32, metadata={"help": "Completions of an optimiser step (DPO: half as many pairs)."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of both methods (default: the next two)."})
    dpo_learning_rate: float = field(default=1.5e-5, metadata={"help": "Of DPO."})
    ppo_learning_rate: float = field(default=5e-4, metadata={"help": "Of PPO."})
    kl_penalty: float = field(default=0.1, metadata={"help": "Of PPO: coefficient of the KL to the warm start."})
    beta: float = field(default=0.1, metadata={"help": "Of DPO."})
    temperatures: list[float] = field(
        default_factory=lambda: [0.6, 0.8, 1.0, 1.2], metadata={"help": "At which DPO's pairs are sampled."}
    )
    min_gap: float = field(default=0.01, metadata={"help": "Between the rewards of a pair."})
    ppo_epochs: int = field(default=1, metadata={"help": "Of PPO: passes over a rollout."})
    mini_batches: int = field(default=4, metadata={"help": "Of PPO: optimiser steps of a pass."})
    eval_samples: int = field(default=256, metadata={"help": "Completions that everything is measured on."})
    warmup_steps: int = field(default=600, metadata={"help": "Supervised steps of the warm start."})
    width: int = field(default=64, metadata={"help": "Of the model."})
    discriminator_epochs: int = field(default=32, metadata={"help": "At most, of each level's discriminator."})
    output_dir: str = field(default="outputs/compare", metadata={"help": "Where the report and the results go."})

    def __post_init__(self) -> None:
        self.temperatures = list(self.temperatures)
        counts = (
            "seeds",
            "rounds",
            "batch_size",
            "ppo_epochs",
            "mini_batches",
            "warmup_steps",
            "width",
            "discriminator_epochs",
        )
        for name in counts:
            check_count(name, getattr(self, name))
        check_count("total_steps", self.total_steps, least=self.rounds)
        check_count("eval_samples", self.eval_samples, least=20)
        for name in ("learning_rate", "dpo_learning_rate", "ppo_learning_rate", "beta"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_not_negative("kl_penalty", self.kl_penalty)
        if self.batch_size % 2:
            raise ValueError(f"`batch_size` must be even, as DPO trains on half as many pairs, got {self.batch_size}")
        if self.completions_of(self.rounds - 1) < LEAST_PROMPTS * len(self.temperatures):
            raise ValueError(
                f"`batch_size` * `mini_batches` must let PPO generate {LEAST_PROMPTS} completions for each of DPO's "
                f"{len(self.temperatures)} `temperatures` in a round, got {self.completions_of(self.rounds - 1)}: DPO may "
                "generate as many tokens"
            )
        if self.width % (2 * HEADS):
            raise ValueError(f"`width` must be a multiple of {2 * HEADS}, got {self.width}")
        PairsConfig(temperatures=self.temperatures, min_gap=self.min_gap)  # which says what is wrong with them
        if self.data != "breast_cancer" and not Path(self.data).is_file():
            raise ValueError(f"`data` must be 'breast_cancer' or the path of a CSV file, got {self.data!r}")

    def rate(self, method: str) -> float:
        """Learning rate of "DPO" or "PPO"."""
        if self.learning_rate is not None:
            return self.learning_rate
        return self.dpo_learning_rate if method == "DPO" else self.ppo_learning_rate

    def steps_of(self, round_: int) -> int:
        """Optimiser steps of a round, the first being 0: equal parts, the first rounds taking what is left over."""
        return self.total_steps // self.rounds + (round_ < self.total_steps % self.rounds)

    def completions_of(self, round_: int) -> int:
        """What PPO generates in a round: whole rollouts, of which the last may have steps left."""
        rollout = self.batch_size * self.mini_batches
        return rollout * -(-self.steps_of(round_) // (self.ppo_epochs * self.mini_batches))
