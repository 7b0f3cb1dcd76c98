"""Options of preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dppo_kernels._checks import check_count, check_not_negative, check_number, check_positive

PAIR_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "chosen_reward",
    "rejected_reward",
    "chosen_temperature",
    "rejected_temperature",
)


@dataclass
class PairsConfig:
    """How pairs are generated and chosen.

    Pairs come from several temperatures on purpose, which makes completions differ. What else reshapes the distribution is off
    by default: with a top-p of 0.9 or a repetition penalty of 1.1 (often seen in this place) completions are drawn from a
    distribution that is not the policy's at any temperature, and DPO then raises and lowers texts that the policy would not
    write.

    Args:
        temperatures: distinct, positive. The order decides between equal rewards: the first wins (and the first loses).
        samples_per_temperature: completions at each.
        top_p: in (0, 1]; 1 is off.
        top_k: 0 is off.
        repetition_penalty: positive; 1 is off.
        max_completion_length: tokens of a completion, its end token included. None: that of the longest of `budget_texts`.
        drop_truncated: leave out completions that this budget ended. TRL's DPOTrainer puts an end token behind every text, so
            that a truncated one that is chosen teaches the model to stop short.
        min_gap: a pair is kept where best - worst > min_gap, strictly.
        reward_weights: of the reward functions; None for 1 each.
        extra_columns: columns of the prompts that the pairs keep; on the command line, also what rewards get beside the answer.
        batch_size: prompts generated at a time, which are a shard of the output. Results depend on it.
        seed: of all completions.
        output_file: a .parquet file; None keeps the pairs in memory.
        use_vllm: generate with vLLM instead of transformers.
        vllm_gpu_memory_utilization: share of the GPU's memory for vLLM, in (0, 1].
        vllm_max_model_length: longest prompt and completion for vLLM; None for the model's own.
        vllm_tensor_parallel_size: GPUs that vLLM splits the model over.

    Raises:
        TypeError, ValueError: an option outside what is said above.
    """

    temperatures: list[float] = field(
        default_factory=lambda: [0.6, 0.8, 1.0, 1.2], metadata={"help": "One completion of each prompt at each."}
    )
    samples_per_temperature: int = field(default=1, metadata={"help": "Completions at each temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "0 is off."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "1 is off."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Tokens (default: of the longest budget text)."})
    drop_truncated: bool = field(default=False, metadata={"help": "Leave out completions without an end token."})
    min_gap: float = field(default=0.01, metadata={"help": "Pairs have best - worst above it."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Of the reward functions (default: 1 each)."})
    extra_columns: list[str] = field(default_factory=list, metadata={"help": "Columns of the prompts that the pairs keep."})
    batch_size: int = field(default=8, metadata={"help": "Prompts at a time, and in a shard."})
    seed: int = field(default=42, metadata={"help": "Of all completions."})
    output_file: str | None = field(default=None, metadata={"help": "A .parquet file."})
    use_vllm: bool = field(default=False, metadata={"help": "Generate with vLLM instead of transformers."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of the GPU's memory for vLLM."})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Longest prompt and completion for vLLM."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that vLLM splits the model over."})

    def __post_init__(self) -> None:
        _check_list("temperatures", self.temperatures, "numbers")
        self.temperatures = list(self.temperatures)
        for temperature in self.temperatures:
            check_positive("temperatures", temperature)
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(
                f"`temperatures` must be distinct, got {self.temperatures}: `samples_per_temperature` asks for several"
            )
        check_count("samples_per_temperature", self.samples_per_temperature)
        if len(self.temperatures) * self.samples_per_temperature < 2:
            raise ValueError(
                f"`temperatures` {self.temperatures} with `samples_per_temperature`={self.samples_per_temperature} must give "
                "at least two completions of a prompt"
            )
        check_positive("top_p", self.top_p)
        if self.top_p > 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}")
        check_count("top_k", self.top_k, least=0)
        check_positive("repetition_penalty", self.repetition_penalty)
        if self.max_completion_length is not None:
            check_count("max_completion_length", self.max_completion_length)
        check_not_negative("min_gap", self.min_gap)
        check_count("batch_size", self.batch_size)
        check_count("seed", self.seed, least=0)
        if self.reward_weights is not None:
            _check_list("reward_weights", self.reward_weights, "numbers")
            for weight in self.reward_weights:
                check_number("reward_weights", weight)
        for name in ("drop_truncated", "use_vllm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}")
        self._check_vllm()
        if not isinstance(self.output_file, str | Path | None):
            raise TypeError(f"`output_file` must be a path or None, got {type(self.output_file).__name__}")
        if self.output_file is not None and Path(self.output_file).suffix != ".parquet":
            raise ValueError(f"`output_file` must end in .parquet, got {self.output_file!r}")
        _check_list("extra_columns", self.extra_columns, "strings")
        for column in self.extra_columns:
            if not isinstance(column, str):
                raise TypeError(f"`extra_columns` must hold strings, got {column!r}")
        taken = [name for name in self.extra_columns if name in PAIR_COLUMNS]
        if taken:
            raise ValueError(f"`extra_columns` holds {taken[0]!r}, which is a column of the pairs")

    def _check_vllm(self) -> None:
        check_positive("vllm_gpu_memory_utilization", self.vllm_gpu_memory_utilization)
        if self.vllm_gpu_memory_utilization > 1:
            raise ValueError(f"`vllm_gpu_memory_utilization` must be in (0, 1], got {self.vllm_gpu_memory_utilization}")
        if self.vllm_max_model_length is not None:
            check_count("vllm_max_model_length", self.vllm_max_model_length)
        check_count("vllm_tensor_parallel_size", self.vllm_tensor_parallel_size)


def _check_list(name: str, value: object, kind: str) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"`{name}` must be a list of {kind}, got {value!r}")
