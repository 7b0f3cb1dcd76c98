"""DAPO: clip-higher, token-level loss, dynamic sampling and overlong reward shaping (arXiv 2503.14476)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dppo_kernels import DIVERGENCES, _checks
from dppo_kernels.trainers.dynamic_sampling import DynamicSamplingMixin
from dppo_kernels.trainers.normaliser import count_step_tokens, tokens_per_step
from dppo_kernels.trainers.policy_config import PolicyConfig
from dppo_kernels.trainers.policy_trainer import PolicyTrainer
from dppo_kernels.trainers.prompt_length import PROMPT_OVERFLOW, PromptLengthMixin
from dppo_kernels.trainers.rewards.length import SoftOverlongPenalty
from dppo_kernels.trainers.sampling import EXHAUSTED_POLICIES, SURPLUS_POLICIES


@dataclass
class DAPOConfig(PolicyConfig):
    """`PolicyConfig` with DAPO's recipe; dynamic sampling and overlong shaping are off until asked for, as in verl.

    Defaults that differ from GRPOConfig's: 16 generations, batches of 1 accumulated 32 times, completions of up to 20480 and
    prompts of up to 2048 tokens, TensorBoard. `epsilon` and `epsilon_high` are .2 and .28 with the default loss.

    Args:
        divergence_type: None for `loss_type`'s clipping; a divergence puts DPPO's trust region in its place.
        filter_groups_enable: dynamic sampling: train on groups with right and wrong answers only, refilled from new prompts.
        filter_groups_metric: what groups are filtered by: a column that a reward function reports through ``log_extra``, the
            name of a reward function, or "reward" for the weighted sum. None = the column "acc" where it is reported, else the
            only reward function there is.
        max_filter_gen_batches: rounds of generation per training batch; 0 = no limit.
        filter_gen_batch_size: prompts per round over all processes. None = as many as what the batch still lacks asks for, by
            the share of groups that were kept, and at most as many as a batch has: fewer are generated for nothing.
        filter_exhausted: after the last round: "error", "train" on the groups found (the loss is rescaled to them), or "top_up"
            with groups that were filtered out.
        filter_surplus: groups beyond a batch: "drop" them, or "carry" them over to the next batch, once, as stale ones.
        apply_overlong_penalty: add the soft punishment of overlong completions to the reward.
        overlong_buffer_len: its length in tokens, the last ones before `max_completion_length`.
        overlong_penalty_factor: the penalty of a completion of `max_completion_length` tokens.
        max_prompt_length: tokens of a prompt, as the chat template renders it. None = no limit.
        prompt_overflow: longer prompts are cut on the left ("left": their last `max_prompt_length` tokens stay), or "drop"ped
            from the training set.
        mask_truncated_completions: overlong filtering: completions without an end are left out of the loss.
        delta: dual clip: cap of the unclipped ratio where the advantage is negative. None = none.
        entropy_coef: also spelled `--entropy_coeff` on the command line.

    Raises:
        ValueError: a setting that cannot be honoured, with the reason.
    """

    divergence_type: str | None = field(
        default=None, metadata={"help": f"DPPO's trust region instead of clipping: one of {', '.join(DIVERGENCES)}."}
    )
    filter_groups_enable: bool = field(default=False, metadata={"help": "Dynamic sampling."})
    filter_groups_metric: str | None = field(default=None, metadata={"help": "What groups are filtered by (default: acc)."})
    max_filter_gen_batches: int = field(default=10, metadata={"help": "Rounds per training batch; 0 = no limit."})
    filter_gen_batch_size: int | None = field(default=None, metadata={"help": "Prompts per round over all processes."})
    filter_exhausted: str = field(default="error", metadata={"help": f"One of {', '.join(EXHAUSTED_POLICIES)}."})
    filter_surplus: str = field(default="drop", metadata={"help": f"One of {', '.join(SURPLUS_POLICIES)}."})
    apply_overlong_penalty: bool = field(default=False, metadata={"help": "Soft punishment of overlong completions."})
    overlong_buffer_len: int = field(default=4096, metadata={"help": "Tokens over which the punishment grows."})
    overlong_penalty_factor: float = field(default=1.0, metadata={"help": "The largest punishment."})
    max_prompt_length: int | None = field(default=2048, metadata={"help": "Tokens of a prompt."})
    prompt_overflow: str = field(default="left", metadata={"help": f"One of {', '.join(PROMPT_OVERFLOW)}."})
    entropy_coef: float = field(
        default=0.0, metadata={"help": "Coefficient of the entropy bonus.", "aliases": ["--entropy_coeff"]}
    )
    num_generations: int | None = field(default=16, metadata={"help": "Completions per prompt."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Completions per micro-batch and device."})
    gradient_accumulation_steps: int = field(default=32, metadata={"help": "Micro-batches per optimiser step."})
    max_completion_length: int | None = field(default=20480, metadata={"help": "Tokens of a completion."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  (the order that the parser of options understands)
        default="tensorboard", metadata={"help": "Where metrics go."}
    )

    def __post_init__(self) -> None:
        _checks.check_choice("filter_exhausted", self.filter_exhausted, EXHAUSTED_POLICIES)
        _checks.check_choice("filter_surplus", self.filter_surplus, SURPLUS_POLICIES)
        _checks.check_choice("prompt_overflow", self.prompt_overflow, PROMPT_OVERFLOW)
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"`max_prompt_length` must be at least 1 token, got {self.max_prompt_length}")
        if self.apply_overlong_penalty:
            self.overlong_penalty()
        super().__post_init__()
        if self.filter_groups_enable:
            self._check_filtering()

    def overlong_penalty(self) -> SoftOverlongPenalty:
        """The reward function that these settings describe."""
        if self.max_completion_length is None:
            raise ValueError("`apply_overlong_penalty` needs a `max_completion_length`, got None")
        return SoftOverlongPenalty(self.max_completion_length, self.overlong_buffer_len, self.overlong_penalty_factor)

    def _check_filtering(self) -> None:
        rows = self.per_device_train_batch_size * self.steps_per_generation
        if rows % self.num_generations:
            raise ValueError(
                "`filter_groups_enable` needs whole groups on every process: `per_device_train_batch_size` * "
                f"`steps_per_generation` = {rows} must be a multiple of `num_generations` = {self.num_generations}"
            )
        size = self.filter_gen_batch_size
        if size is not None and (size < 1 or size % self.world_size):
            raise ValueError(f"`filter_gen_batch_size` must be a multiple of the {self.world_size} processes, got {size}")
        for name, value, why in (
            ("scale_rewards", "batch", "would take the deviation over groups that are filtered out"),
            ("multi_objective_aggregation", "normalize_then_sum", "would normalise over groups that are filtered out"),
            ("remove_unused_columns", True, "drops the columns that answers are checked against"),
        ):
            if getattr(self, name) == value:
                raise ValueError(f"`{name}`={value!r} {why}: not with `filter_groups_enable`")
        if self.filter_exhausted == "train" and self.loss_type == "bnpo" and self.divergence_type is None:
            raise ValueError("`filter_exhausted`='train' cannot rescale `loss_type`='bnpo', whose micro-batches weigh alike")


class DAPOTrainer(DynamicSamplingMixin, PromptLengthMixin, PolicyTrainer):
    """GRPOTrainer with DAPO's recipe.

    Takes GRPOTrainer's arguments; `args` is a `DAPOConfig`. The token-level loss is divided by the active tokens of the whole
    optimiser step over all processes; where a step spans several rollouts (`gradient_accumulation_steps` is larger than
    `steps_per_generation`), whose tokens are not known in advance, by TRL's estimate of them. With `apply_overlong_penalty` a
    reward function "overlong_penalty" is added, of weight 1. Reward functions report accuracy apart from the reward through
    TRL's ``log_extra("acc", values)``, as `MathAnswerReward` does.

    Raises:
        TypeError, ValueError: a model or setting that cannot be trained correctly, with the reason.
        RuntimeError: while training, when the prompts give too few groups with mixed answers.
    """

    _name = "DAPO"
    _tag_names = ["trl", "dapo"]  # noqa: RUF012  (TRL's attribute, read-only)
    _paper = {"title": "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", "id": "2503.14476"}  # noqa: RUF012
    config_class = DAPOConfig

    # TRL's: one entry a reward function.
    reward_funcs: list[Any]
    reward_func_names: list[str]
    reward_processing_classes: list[Any]
    reward_weights: Tensor

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        if self.args.apply_overlong_penalty:
            penalty = self.args.overlong_penalty()
            self.reward_funcs = [*self.reward_funcs, penalty]
            self.reward_func_names = [*self.reward_func_names, penalty.__name__]
            self.reward_processing_classes = [*self.reward_processing_classes, None]
            self.reward_weights = torch.cat([self.reward_weights, torch.ones(1)])

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not buffered:
            count_step_tokens(self, self._buffered_inputs)
        return inputs

    def step_tokens(self, inputs: Mapping[str, Any]) -> Tensor:
        return tokens_per_step(self, inputs)

    def _denominator(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor | float:
        count = super()._denominator(inputs, mask)
        # Blank rows of a batch that was not filled count as sequences; tokens they have none.
        return count * inputs["filled"] if "filled" in inputs and self.spec.reduction != "token_mean" else count

    def _entropy_denominator(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor | float:
        """Tokens of the optimiser step, whatever micro-batches they are in; of one's own where the loss is a mean over them."""
        if self.spec.divergence is None and self.loss_type == "bnpo":
            return super()._entropy_denominator(inputs, mask)
        return self.step_tokens(inputs)
