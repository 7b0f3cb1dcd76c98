"""PPO: GRPO's rollouts and rewards, a value model, token rewards and generalised advantages (arXiv 1707.06347, 1909.08593)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from dppo_kernels import Stat, value_loss
from dppo_kernels.trainers._trl_seam import create_model_from_path, shuffle_sequence_dict, split_tensor_dict
from dppo_kernels.trainers.dropout import disable_dropout
from dppo_kernels.trainers.head import head_shape, is_partitioned
from dppo_kernels.trainers.normaliser import (
    STEP_COUNTS,
    active_tokens,
    count_step_tokens,
    tokens_per_step,
    whole_sequences,
)
from dppo_kernels.trainers.policy_trainer import PolicyTrainer
from dppo_kernels.trainers.ppo_config import PPOConfig
from dppo_kernels.trainers.ppo_rollout import PPORolloutMixin
from dppo_kernels.trainers.sharding import is_sharded, prepare_frozen, unpartitioned
from dppo_kernels.trainers.value_model import SharedHead, TokenValues, check_disjoint, make_value_model
from dppo_kernels.trainers.value_optimizer import clip_to, optimizer_class, parameter_groups, total_norm
from dppo_kernels.trainers.value_state import ValueStateMixin

# Logged name -> (stat, how it is read).
PPO_METRICS = {
    "policy/approx_kl": ("approx_kl", "mean"),
    "policy/clip_fraction": ("clipped", "mean"),
    "policy/ratio_mean": ("ratio", "mean"),
    "policy/ratio_max": ("ratio", "max"),
    "policy/ratio_deviation": ("ratio_deviation", "mean"),
    "policy/entropy": ("entropy", "mean"),
    "policy/ref_kl": ("ref_kl", "mean"),
    "value/loss": ("value_loss", "mean"),
    "value/error": ("value_error", "mean"),
    "value/clip_fraction": ("value_clipped", "mean"),
    "policy/grad_norm": ("policy_grad_norm", "mean"),
    "value/grad_norm": ("value_grad_norm", "mean"),
}


class PPOTrainer(ValueStateMixin, PPORolloutMixin, PolicyTrainer):
    """GRPOTrainer that trains a policy against a value model, in one optimiser.

    Takes GRPOTrainer's arguments and those of TRL's removed PPOTrainer; `args` is a `PPOConfig`. The loss is PPO's clipped one
    plus `vf_coef` times the clipped value loss, both means over the tokens of the optimiser step, over all processes.

    Args:
        model: the policy, as GRPOTrainer takes it.
        reward_funcs: as GRPOTrainer takes them; may be left out where there is a `reward_model`.
        args: a `PPOConfig`.
        ref_model: a causal LM, or its path, that the KL is against. None = a copy of the policy; where that is a path or
            `sync_ref_model` is set, loaded again from its path; under PEFT the policy without its adapter.
        reward_model: a sequence classification model with one label, or its path; one more reward function. Where it is a model
            and `reward_processing_classes` is not given, it reads what the policy's tokenizer writes.
        value_model: a token or sequence classification model with one label, or its path. None = a copy of the policy's
            backbone with a head that starts at 0; with `share_value_backbone`, a head on the policy itself.

    Raises:
        TypeError, ValueError: a model or setting that cannot be trained correctly, with the reason.
    """

    _name = "PPO"
    _tag_names = ["trl", "ppo"]  # noqa: RUF012  (TRL's attribute, read-only)
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}  # noqa: RUF012
    config_class: type[PPOConfig] = PPOConfig
    reference_name = "ref_model"  # the argument that a given reference came by
    value_optimizer: torch.optim.Optimizer | None = None  # of the value model alone, where the policy's does not hold it

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *rest: Any,
        ref_model: Any = None,
        reward_model: Any = None,
        value_model: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = self.config_class(f"{self._name.lower()}-output")
        if not isinstance(args, self.config_class):
            raise TypeError(f"`args` must be a {self.config_class.__name__}, got {type(args).__name__}")
        if args.share_value_backbone and value_model is not None:
            raise ValueError("`share_value_backbone` puts the value head on the policy: `value_model` would not be used")
        if ref_model is not None and not args.kl_coef:
            raise ValueError("`ref_model` would not be used: `kl_coef` is 0")
        if ref_model is not None and args.sync_ref_model:
            raise ValueError("`sync_ref_model` moves a reference loaded from the policy's path: leave `ref_model` out")
        peft_config = kwargs.get("peft_config", rest[7] if len(rest) > 7 else None)
        is_plain = not isinstance(model, str) and peft_config is None and not is_peft_model(model)
        if args.kl_coef and ref_model is None and is_plain and not args.sync_ref_model:
            if any(map(is_partitioned, model.parameters())):
                raise ValueError(
                    "ZeRO-3 has divided `model`, which cannot be copied for a reference: pass its path, or a `ref_model`"
                )
            ref_model = copy.deepcopy(model)  # what it was loaded from may be another model
        if reward_model is not None:
            reward_funcs = _with_reward_model(reward_funcs, reward_model, rest, kwargs)
        self._early_stopped = False  # the rest of this rollout's steps is not made
        self._window: list[Stat] = []  # approximate KL of the micro-batches of this optimiser step
        # TRL loads and scores a reference where `beta` is not 0; that it is in the rewards here, `args` says.
        in_loss, args.beta = args.beta, args.beta if ref_model is not None or not args.kl_coef else args.kl_coef
        try:
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        finally:
            args.beta = in_loss
        if ref_model is not None:
            self._take_reference(ref_model)
        self.beta = args.kl_coef or args.beta
        self.stat_metrics = {**PPO_METRICS, **_divergence_metrics(self.stat_metrics, self.spec.divergence)}
        self.kl_controller = args.kl_controller()
        self.stop_rule = self.make_stop_rule()
        policy = self.model
        if args.share_value_backbone:
            self.value_model: TokenValues | SharedHead = SharedHead(head_shape(policy)[1])
        else:
            options = {"trust_remote_code": args.trust_remote_code, "dtype": policy.dtype}
            # Under ZeRO-3 too, a value model is whole on every process.
            with unpartitioned(policy):
                self.value_model = make_value_model(value_model, policy, **options)
            if any(map(is_partitioned, self.value_model.parameters())):
                raise ValueError(
                    "`value_model` was loaded under ZeRO-3, which divides it: pass its path, or load it before `args` is made"
                )
            models = [("the policy", policy), ("the reference", self.ref_model)]
            models += [
                (f"the reward model {name!r}", f) for name, f in zip(self.reward_func_names, self.reward_funcs, strict=True)
            ]
            check_disjoint("value_model", self.value_model, [(n, m) for n, m in models if isinstance(m, nn.Module)])
            if args.gradient_checkpointing:
                self.value_model.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        if args.disable_dropout:
            disable_dropout(self.value_model)
        self.value_model.to(self.accelerator.device).eval()
        self._wrapped_values: nn.Module = self.value_model
        self.add_callback(_Steps(self))

    def _take_reference(self, ref_model: Any) -> None:
        self.ref_model = self.take_frozen(self.reference_name, ref_model)
        self._install_scoring(self.ref_model)

    def take_frozen(self, name: str, model: Any) -> Any:
        """A causal LM, or that of a path, that is scored but not trained: checked, without dropout, on this device.

        Raises:
            ValueError: it is over another vocabulary, has an adapter, or shares parameters with the policy.
        """
        if isinstance(model, str):
            options = dict(self.args.model_init_kwargs or {})
            options.setdefault("dtype", self.model.dtype)
            options.setdefault("attn_implementation", self.model.config._attn_implementation)
            options["device_map"] = None
            model = create_model_from_path(model, **options)
        own, vocab = (head_shape(m)[0] for m in (self.model, model))
        if vocab != own:
            raise ValueError(f"`{name}` has a vocabulary of {vocab}, the policy one of {own}")
        if is_peft_model(model):
            raise ValueError(f"`{name}` must not have a PEFT adapter: merge it, or leave `{name}` out")
        return self.freeze(name, model)

    def freeze(self, name: str, model: nn.Module, *, whole: bool = False) -> Any:
        """A model of any kind in eval mode, without dropout, as `prepare_frozen`; refused if training would change it."""
        check_disjoint(name, model, [("the policy", self.model)])
        disable_dropout(model)
        return prepare_frozen(self.accelerator, model, whole=whole)

    def _check_model(self, policy: Any) -> None:
        super()._check_model(policy)
        if self.is_deepspeed_enabled and self.args.target_kl is not None:
            raise ValueError(
                "`target_kl` ends an update before a step is made, and DeepSpeed makes it in the backward: not with it"
            )
        if is_sharded(self.accelerator) and self.args.fp16:
            raise ValueError(
                "`fp16` with FSDP and DeepSpeed scales the loss for the policy alone, not for values: use bf16 or fp32"
            )

    # Rollouts

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        training, buffered = self.model.training, self._buffered_inputs
        if training and buffered is not None and self._step % self.args.steps_per_generation == 0 and not self._is_first_step():
            self._buffered_inputs = shuffled_again(buffered)  # a further pass
        inputs = super()._prepare_inputs(generation_batch)
        if training and self._buffered_inputs is not buffered:
            self.count_rollout(self._buffered_inputs)
        return inputs

    def count_rollout(self, micro_batches: Sequence[dict[str, Any]]) -> None:
        """Called with the micro-batches of each pass over a rollout, to write down what their losses are divided by."""
        count_step_tokens(self, micro_batches)

    def _is_first_step(self) -> bool:
        """Whether the micro-step to come begins an update, with a rollout of its own."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    # Loss

    def step_tokens(self, inputs: Mapping[str, Any]) -> Tensor:
        return tokens_per_step(self, inputs)

    def _entropy_denominator(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        return self.step_tokens(inputs)

    def scoring_options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"with_hidden": True} if isinstance(self.value_model, SharedHead) else {}

    def finish_loss(self, loss: Tensor, scores: Any, inputs: dict[str, Any], stats: dict[str, Stat]) -> Tensor:
        ratio, squared = stats["ratio"], stats["ratio_squared"]
        # Linear in stats that every loss has: k3 = r - 1 - log r of the anchor's KL from the policy, and (r - 1)^2.
        approx_kl = Stat(ratio.sum - ratio.count + stats["anchor_kl"].sum, ratio.count, ratio.max)
        stats["approx_kl"] = approx_kl
        stats["ratio_deviation"] = Stat(squared.sum - 2 * ratio.sum + ratio.count, ratio.count, ratio.max)
        if self.model.training:
            self._window.append(approx_kl)
        if "masked" in stats:
            stats["clipped"] = stats["masked"]
        return self.add_value_loss(loss, scores, inputs, stats)

    def add_value_loss(self, loss: Tensor, scores: Any, inputs: dict[str, Any], stats: dict[str, Stat]) -> Tensor:
        """The coupled loss."""
        if isinstance(self.value_model, SharedHead):
            values = self._wrapped_values(scores.hidden)
        else:
            values = self._values_in_training(inputs)
        return loss + self.args.vf_coef * self.value_term(values, inputs, stats)

    def _values_in_training(self, inputs: Mapping[str, Any]) -> Tensor:
        self.value_model.train(self.model.training)
        ids, attention = whole_sequences(inputs)
        with self.accelerator.autocast():
            return self._wrapped_values(ids, attention, inputs["completion_ids"].shape[1])

    def value_term(self, values: Tensor, inputs: dict[str, Any], stats: dict[str, Stat]) -> Tensor:
        """Clipped value loss of a micro-batch, over the tokens of its optimiser step."""
        mask, tokens = active_tokens(inputs), self.step_tokens(inputs)
        old, returns = inputs["old_values"], inputs["returns"]
        loss, found = value_loss(values, old, returns, mask, clip=self.args.cliprange_value, denominator=tokens)
        stats |= {name: found[name] for name in ("value_error", "value_clipped")}
        total = loss.detach() * tokens
        stats["value_loss"] = Stat(total, mask.sum(), total)
        return loss

    # Steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._is_first_step():
            self._early_stopped = False
        if self._early_stopped or self.skips_policy():
            return self._skip_step(model, inputs)
        if self._step % self.args.gradient_accumulation_steps == 0:
            self._window = []
        with self._value_sync():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self._stops_here():
                self._early_stopped = True
                self._drop_gradients(model)
            self._metrics["train"]["policy/updated"].append(float(not self._early_stopped))
        return loss

    def skips_policy(self) -> bool:
        """Whether this update leaves the policy as it is."""
        return False

    def _skip_step(self, model: Any, inputs: Any) -> Tensor:
        """Count a micro-step, and generate where it begins an update, without a forward of the policy."""
        model.train()
        if self._is_first_step():
            self._prepare_inputs(inputs)
        self._step += 1
        if self.accelerator.sync_gradients:
            self._metrics["train"]["policy/updated"].append(0.0)
        return torch.zeros((), device=self.args.device)

    def make_stop_rule(self) -> Callable[[float], bool] | None:
        """Whether a mini-batch's KL from the rollout's policy ends the update. None: nothing does, and no KL is read."""
        target = self.args.target_kl
        return None if target is None else lambda kl: not kl <= target  # NaN exceeds

    def _stops_here(self) -> bool:
        if self.stop_rule is None:
            return False
        kl = torch.stack([torch.stack([stat.sum, stat.count.float()]) for stat in self._window]).sum(0)
        total, count = self.accelerator.reduce(kl, reduction="sum").tolist()
        return count > 0 and self.stop_rule(total / count)

    def _drop_gradients(self, model: Any) -> None:
        # Optimisers pass over parameters without a gradient: weights, moments and decay stay as they are.
        model.zero_grad(set_to_none=True)
        self.value_model.zero_grad(set_to_none=True)

    def _value_sync(self) -> Any:
        """Gradients of a wrapped value model are averaged with the last micro-batch of a step."""
        if isinstance(self._wrapped_values, DistributedDataParallel) and not self.accelerator.sync_gradients:
            return self._wrapped_values.no_sync()
        return torch.enable_grad()

    def after_step(self) -> None:
        """Called after every optimiser step, the last one of an update included, before logging and saving."""
        self.value_model.zero_grad(set_to_none=True)  # the training loop does so for the policy alone

    # Optimiser

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        self._wrap_value_model()
        self._optimize_values(optimizer)
        return optimizer

    def _optimize_values(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = any(id(p) in held for p in self.value_model.parameters())
        if not is_sharded(self.accelerator):
            for group in [] if own else parameter_groups(self, self.value_model, self.args.weight_decay):
                optimizer.add_param_group(group)
            return
        # The engine divides what its optimiser holds: the value model, which is whole, has one of its own, in step with it.
        if own:
            raise ValueError("beside a sharded policy the value model has an optimiser of its own: leave its parameters out")
        if self.value_optimizer is None:
            self.value_optimizer = self.make_optimizer(self.value_model)

    def make_optimizer(self, *models: nn.Module) -> torch.optim.Optimizer:
        """The class and options of `args.optim`, over all that is trained of these models."""
        kind, options = optimizer_class(self, self.args, models[0])
        return kind([group for model in models for group in parameter_groups(self, model, self.args.weight_decay)], **options)

    def step_values(self) -> None:
        """Called after every step of the policy's optimiser."""
        if self.value_optimizer is not None:
            for group in self.value_optimizer.param_groups:
                group["lr"] = self._get_learning_rate()
            self.value_optimizer.step()

    def _wrap_value_model(self) -> None:
        if self.accelerator.num_processes > 1 and not isinstance(self._wrapped_values, DistributedDataParallel):
            device = self.accelerator.device
            self._wrapped_values = DistributedDataParallel(
                self.value_model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
            )

    def _clip_grad_norm(self, model: Any) -> Tensor:
        return self._clip_both(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Tensor | None = None) -> Tensor | float:
        return self._clip_both(model, math.inf) if grad_norm is None else grad_norm

    def _clip_both(self, model: Any, limit: float) -> Tensor:
        """Clip the norm of both models' gradients together, as one optimiser steps both; log each model's own.

        DeepSpeed clips the policy's by itself, within its backward: then each model's norm is held to the limit.
        """
        if self.is_deepspeed_enabled:
            policy = self.accelerator.clip_grad_norm_(model.parameters(), limit)  # what it was; None before the first step
            known = None if policy is None else torch.tensor(float(policy))
        else:
            self.accelerator.unscale_gradients()
            known = total_norm(model)
        norms = {"policy": known, "value": total_norm(self.value_model)}
        found = {name: norm.to(self.args.device) for name, norm in norms.items() if norm is not None}
        self.record({f"{name}_grad_norm": single(norm) for name, norm in found.items()})
        if not found:
            return torch.zeros((), device=self.args.device)
        total = torch.linalg.vector_norm(torch.stack(list(found.values())))
        if math.isfinite(limit):
            clip_to(self.value_model, limit, found.get("value", total) if self.is_deepspeed_enabled else total)
            if not self.is_deepspeed_enabled:
                clip_to(model, limit, total)
        return total


class _Steps(TrainerCallback):
    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_values()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()


def single(value: Tensor) -> Stat:
    """One measurement, on its device: it is read when it is logged."""
    return Stat(value, torch.ones_like(value), value)


def shuffled_again(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a rollout dealt out anew, as many a micro-batch."""
    rollout = {}
    for name, first in micro_batches[0].items():
        if name in STEP_COUNTS:
            continue
        whole = first is None or (isinstance(first, Tensor) and first.dim() == 0)
        rollout[name] = first if whole else torch.cat([inputs[name] for inputs in micro_batches])
    return split_tensor_dict(shuffle_sequence_dict(rollout), len(micro_batches))


def _divergence_metrics(of_the_loss: Mapping[str, tuple[str, str]], divergence: str | None) -> dict[str, tuple[str, str]]:
    """What DPPO logs about its trust region and the engine, where it takes clipping's place."""
    if divergence is None:
        return {}
    groups = ("divergence/", "masked/", "engine_mismatch/")
    return {name: stat for name, stat in of_the_loss.items() if name.startswith(groups)}


def _with_reward_model(reward_funcs: Any, reward_model: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Reward functions with the model as the last; sets its tokenizer in `kwargs` where it would not be found by a path."""
    given = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    processing_class = kwargs.get("processing_class", rest[2] if len(rest) > 2 else None)
    if not isinstance(reward_model, str) and len(rest) <= 3 and kwargs.get("reward_processing_classes") is None:
        kwargs["reward_processing_classes"] = [*[None] * len(given), processing_class]
    return [*given, reward_model]
