"""PPO of a student with a teacher: a distillation loss beside the policy's and the values', scores processed as they come."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dppo_kernels import Stat
from dppo_kernels.trainers.distill_data import check_completions, tokenize_completions
from dppo_kernels.trainers.distill_ppo_config import DistillPPOConfig
from dppo_kernels.trainers.distill_setup import DistillSetupMixin
from dppo_kernels.trainers.head import head_shape
from dppo_kernels.trainers.normaliser import STEP_DISTILLED, active_tokens, count_step_tokens, whole_sequences
from dppo_kernels.trainers.ppo import PPOTrainer
from dppo_kernels.trainers.scoring import install_scoring
from dppo_kernels.trainers.teacher import Teacher, check_teacher, check_tokenizer, gives_logits
from dppo_kernels.trainers.value_model import check_disjoint

# Logged name -> (stat, how it is read).
DISTILL_METRICS = {
    "distill/loss": ("distill_loss", "mean"),
    "distill/divergence": ("distill_divergence", "mean"),
    "distill/agreement": ("distill_agreement", "mean"),
    "distill/student_entropy": ("distill_student_entropy", "mean"),
}


class DistillPPOTrainer(DistillSetupMixin, PPOTrainer):
    """PPOTrainer with a teacher: the loss also has `kd_coef` times the divergence of student and teacher per token.

    Takes PPOTrainer's arguments; `args` is a `DistillPPOConfig`. The optimiser, its schedule, early stopping and what scores go
    through are set up by four methods that may be overridden, see `DistillSetupMixin`. With `kd_data="rollouts"` the teacher's
    hidden states of a rollout are computed once and serve all passes.

    Args:
        model: the student, a causal LM as GRPOTrainer takes it; also under the name `student`. If it has a method
            `get_student_logits(input_ids, attention_mask)`, its logits [B, S, V] are what is compared with the teacher.
        reward_funcs: as PPOTrainer.
        args: a `DistillPPOConfig`; also under the name `config`.
        teacher: a causal LM over the student's vocabulary, or its path; or any object with a method
            `get_teacher_logits(input_ids, attention_mask)`, which is asked for logits [B, S, V] at every micro-batch. It is not
            trained.
        student: another name of `model`.
        config: another name of `args`.
        ref_model: as PPOTrainer; not with `teacher_as_reference`.

    Raises:
        TypeError, ValueError: a model or setting that cannot be trained correctly, with the reason.

    Source: PPO 1707.06347; distillation on the student's own samples, 2306.13649.
    """

    _name = "DistillPPO"
    _tag_names = ["trl", "ppo", "distill-ppo"]  # noqa: RUF012  (TRL's attribute, read-only)
    config_class: type[DistillPPOConfig] = DistillPPOConfig
    args: DistillPPOConfig

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: Any = None,
        *rest: Any,
        teacher: Any = None,
        student: Any = None,
        config: Any = None,
        ref_model: Any = None,
        **kwargs: Any,
    ) -> None:
        model, args = _either("model", model, "student", student), _either("args", args, "config", config)
        if model is None:
            raise TypeError("`student` is missing: a causal LM or its path")
        if teacher is None:
            raise TypeError("`teacher` is missing: a causal LM, its path, or an object with a method `get_teacher_logits`")
        if kwargs.get("optimizers", rest[5] if len(rest) > 5 else (None, None)) != (None, None):
            raise ValueError("`optimizers` would go past `_setup_optimizer` and `_setup_scheduler`: override those")
        if args is None:
            args = self.config_class(f"{self._name.lower()}-output")
        if isinstance(args, self.config_class) and args.teacher_as_reference:
            if ref_model is not None:
                raise ValueError("`ref_model` would not be used: with `teacher_as_reference` the KL is against the teacher")
            if gives_logits(teacher):
                raise ValueError("`teacher_as_reference` needs a teacher whose own head is used, not `get_teacher_logits`")
            ref_model, self.reference_name = teacher, "teacher"
        check_teacher(teacher)
        self._steps_made = 0  # optimiser steps of this update
        super().__init__(model, reward_funcs, args, *rest, ref_model=ref_model, **kwargs)
        self.score_processor = self._setup_score_processing()
        self.stat_metrics = {**self.stat_metrics, **DISTILL_METRICS}
        self.teacher = self._take_teacher(teacher)
        if self.args.kd_data == "dataset":
            check_completions(self.train_dataset)

    def _take_teacher(self, given: Any) -> Teacher:
        if isinstance(given, str):
            check_tokenizer(given, self._tokenizer)
        vocab, _ = head_shape(self.model)
        if self.args.teacher_as_reference:
            model = self.accelerator.unwrap_model(self.ref_model)
        elif gives_logits(given):
            model = self.freeze("teacher", given, whole=True) if isinstance(given, nn.Module) else given
        else:
            model = self.accelerator.unwrap_model(self.take_frozen("teacher", given))
            install_scoring(model, temperature=1.0)
        if isinstance(model, nn.Module):
            check_disjoint("teacher", model, [("the value model", self.value_model)])
        return Teacher(model, vocab)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.score_processor = self._setup_score_processing()
        self._steps_made = 0
        return super().train(*args, **kwargs)

    # Rollouts

    def process_scores(self, scores: Tensor) -> Tensor:
        processed = super().process_scores(scores)
        metrics, moments = self._metrics["train" if self.model.training else "eval"], self.score_processor.moments
        mean = float(torch.where(scores.isfinite(), scores, torch.nan).nanmean())
        if not math.isnan(mean):
            metrics["objective/raw_scores"].append(mean)
        metrics["objective/score_mean"].append(moments.mean)
        metrics["objective/score_std"].append(moments.std)
        return processed

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.args.kd_coef and self.args.kd_data == "rollouts":
            if not self.teacher.gives_logits:
                ids, attention = whole_sequences(output)
                output["teacher_hidden"] = self._teacher_hidden(ids, attention, output["completion_ids"].shape[1])
        elif self.args.kd_coef and self.model.training:
            self._add_dataset_completions(inputs, output)
        if self.args.optimize_cuda_cache:
            torch.cuda.empty_cache()
        return output

    def _add_dataset_completions(self, rows: list[dict[str, Any]], output: dict[str, Any]) -> None:
        tokens = tokenize_completions(rows, self._tokenizer, self.max_completion_length, self.accelerator.device)
        output["kd_ids"], output["kd_mask"] = tokens
        if not self.teacher.gives_logits:
            ids, attention = _dataset_sequences(output)
            output["teacher_hidden"] = self._teacher_hidden(ids, attention, output["kd_ids"].shape[1])

    def _teacher_hidden(self, ids: Tensor, attention: Tensor, length: int) -> Tensor:
        size = self._scored_at_once()
        with self.accelerator.autocast():
            parts = [self.teacher.hidden(*rows, length) for rows in zip(ids.split(size), attention.split(size), strict=True)]
        return torch.cat(parts)

    def count_rollout(self, micro_batches: Sequence[dict[str, Any]]) -> None:
        super().count_rollout(micro_batches)
        if "kd_mask" in micro_batches[0]:
            count_step_tokens(self, micro_batches, STEP_DISTILLED, lambda inputs: inputs["kd_mask"])

    # Loss

    def scoring_options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        options = super().scoring_options(inputs)
        if not self._is_distilled(inputs):
            return options
        args, mask = self.args, _distilled_tokens(inputs)
        sequences = _dataset_sequences(inputs) if "kd_mask" in inputs else whole_sequences(inputs)
        with self.accelerator.autocast():
            logits = self.teacher.logits(*sequences, mask.shape[1])
        distill = {
            "teacher": functools.partial(self.teacher.side, inputs.get("teacher_hidden"), logits),
            "loss_mask": mask,
            "kind": args.kd_kind,
            "beta": args.kd_beta,
            "temperature": args.kd_temperature,
            "t_squared": args.kd_t_squared,
            "denominator": self._distilled_per_step(inputs),
            "with_entropy": True,
            "with_agreement": True,
        }
        if "kd_mask" in inputs:
            distill["sequences"] = sequences
        return {**options, "distill": distill}

    def _is_distilled(self, inputs: Mapping[str, Any]) -> bool:
        """An evaluation has no completions of the dataset."""
        return bool(self.args.kd_coef) and (self.args.kd_data == "rollouts" or "kd_mask" in inputs)

    def _distilled_per_step(self, inputs: Mapping[str, Any]) -> Tensor:
        """Tokens of the optimiser step that are distilled on, for one process."""
        if "kd_mask" not in inputs:
            return self.step_tokens(inputs)
        return inputs[STEP_DISTILLED].clamp(min=1.0) / self.accelerator.num_processes

    def finish_loss(self, loss: Tensor, scores: Any, inputs: dict[str, Any], stats: dict[str, Stat]) -> Tensor:
        loss = super().finish_loss(loss, scores, inputs, stats)
        if scores.distill_loss is None:
            return loss
        stats |= {f"distill_{name}": stat for name, stat in scores.distill_stats.items()}
        total = scores.distill_loss.detach() * self._distilled_per_step(inputs)
        stats["distill_loss"] = Stat(total, _distilled_tokens(inputs).sum(), total)
        return loss + self.args.kd_coef * scores.distill_loss

    # Steps

    def after_step(self) -> None:
        super().after_step()
        self._steps_made += not self._early_stopped
        if self._is_first_step():  # the step to come is another update's
            self._metrics["train"]["policy/epochs"].append(self._steps_made / self.args.num_mini_batches)
            self._steps_made = 0
            if self.args.optimize_cuda_cache:
                torch.cuda.empty_cache()

    # Checkpoints

    def resume_signature(self) -> dict[str, float | str]:
        distilled = self.args.kd_data if self.args.kd_coef else "nothing"
        return {**super().resume_signature(), "distilled": distilled, "teacher_width": self.teacher.width}

    def extra_resume_state(self) -> dict[str, Any]:
        return {**super().extra_resume_state(), "steps_made": self._steps_made}

    def load_extra_resume_state(self, state: dict[str, Any]) -> None:
        super().load_extra_resume_state(state)
        self._steps_made = state["steps_made"]

    def portable_resume_state(self) -> dict[str, Any]:
        return {**super().portable_resume_state(), "score_processor": self.score_processor.state_dict()}

    def load_portable_resume_state(self, state: dict[str, Any]) -> None:
        super().load_portable_resume_state(state)
        self.score_processor.load_state_dict(state["score_processor"])


def _either(name: str, value: Any, other_name: str, other: Any) -> Any:
    if value is not None and other is not None:
        raise ValueError(f"`{other_name}` is another name of `{name}`: give one of them")
    return other if value is None else value


def _distilled_tokens(inputs: Mapping[str, Any]) -> Tensor:
    return inputs["kd_mask"] if "kd_mask" in inputs else active_tokens(inputs)


def _dataset_sequences(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`whole_sequences` with the dataset's completions."""
    given = {"completion_ids": inputs["kd_ids"], "completion_mask": inputs["kd_mask"].to(inputs["prompt_mask"].dtype)}
    return whole_sequences({**inputs, **given})
