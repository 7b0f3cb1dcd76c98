"""Exact resume for trainers on GRPOTrainer: what TRL 1.16 leaves out of a checkpoint, saved and restored.

TRL restores neither its micro-step counter nor the buffered rollouts, so a run saved inside a generation window starts a new
one; its sampler restarts from the first epoch's permutation; a reference model that follows the policy is not saved. With this
mixin, training N + M steps and training N, saving, loading and training M give the same bits, logs included (but for the final
`train_loss`, which transformers divides by the steps of the last call alone).
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger

from dppo_kernels.trainers._trl_seam import RepeatSampler

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: GRPOTrainer comes after it in the bases

logger = get_logger(__name__)

REFERENCE_FILE = "reference_model.pt"


class EpochRepeatSampler(RepeatSampler):
    """RepeatSampler whose permutation depends on the epoch alone, and equals TRL's in an uninterrupted run."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):  # an uninterrupted run has drawn one permutation per earlier epoch
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


class ExactResumeMixin(Host):
    """Put before GRPOTrainer in the bases. Extend `extra_resume_state` for more state; it must be loadable as weights."""

    def extra_resume_state(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them that a subclass needs back; called on every process."""
        return {}

    def load_extra_resume_state(self, state: dict[str, Any]) -> None:
        """Receives what `extra_resume_state` returned."""

    def portable_resume_state(self) -> dict[str, Any]:
        """What a subclass needs back whatever the settings and the number of processes are; the same on every process."""
        return {}

    def load_portable_resume_state(self, state: dict[str, Any]) -> None:
        """Receives what `portable_resume_state` returned."""

    def resume_signature(self) -> dict[str, float | str]:
        """Settings that a buffered rollout depends on: where one differs, the buffer is of no use."""
        corrects = self.use_vllm and self.args.vllm_importance_sampling_correction
        return {
            "processes": self.accelerator.num_processes,
            "process": self.accelerator.process_index,
            "steps_per_generation": self.args.steps_per_generation,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "num_iterations": self.num_iterations,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "num_generations": self.num_generations,
            "temperature": self.temperature,
            "scores_reference": int(self.beta != 0),
            "use_vllm": int(self.use_vllm),
            "importance_sampling": self.args.vllm_importance_sampling_mode if corrects else "none",
            "tools": int(bool(self.tools)),
        }

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # A second call starts over, with new rollouts; a resumed one gets its own back below.
        self._step, self._buffered_inputs = 0, None
        self._resumed_logging: dict[str, Any] | None = None
        return super().train(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {
            "signature": self.resume_signature(),
            "step": self._step,
            "buffered_inputs": self._buffered_inputs,
            "metrics": {mode: dict(metrics) for mode, metrics in self._metrics.items()},
            "logging": {"tr_loss": self._tr_loss.detach().cpu(), "last_logged": self._globalstep_last_logged},
            "extra": self.extra_resume_state(),
            "portable": self.portable_resume_state(),
        }
        os.makedirs(output_dir, exist_ok=True)
        torch.save(state, self._resume_file(output_dir, self.accelerator.process_index))
        if self._has_moving_reference() and self.args.should_save:
            reference = self.accelerator.unwrap_model(self.ref_model)
            torch.save(reference.state_dict(), os.path.join(output_dir, REFERENCE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        reference_file = os.path.join(checkpoint, REFERENCE_FILE)
        if self._has_moving_reference() and os.path.isfile(reference_file):
            weights = torch.load(reference_file, map_location="cpu", weights_only=True)
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(weights)
        path = self._resume_file(checkpoint, self.accelerator.process_index)
        if not os.path.isfile(path):  # a process that was not there: what is portable comes from the first
            path = self._resume_file(checkpoint, 0)
        if not os.path.isfile(path):
            logger.warning(f"{path} is missing: the run continues, but not exactly (a new rollout is generated)")
            return
        device = self.accelerator.device
        # torch.load knows no "cpu:0", which is what a CPU process of several calls itself.
        state = torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
        self.load_portable_resume_state(state["portable"])
        changed = {
            name: (then, now) for name, now in self.resume_signature().items() if (then := state["signature"].get(name)) != now
        }
        if changed:
            differences = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in changed.items())
            logger.warning(f"{path} was saved with other settings ({differences}): a new rollout is generated")
            return
        self._step = state["step"]
        self._buffered_inputs = state["buffered_inputs"]
        for mode, metrics in state["metrics"].items():
            self._metrics[mode].update(metrics)
        self._resumed_logging = state["logging"]
        self.load_extra_resume_state(state["extra"])

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        stock = super()._get_train_sampler(dataset)
        self._train_sampler = EpochRepeatSampler(
            stock.data_source,
            mini_repeat_count=stock.mini_repeat_count,
            batch_size=stock.batch_size,
            repeat_count=stock.repeat_count,
            shuffle=stock.shuffle,
            seed=stock.seed,
        )
        return self._train_sampler

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        # Set here: transformers and accelerate do not reach a sampler below a sharded or skipping batch sampler.
        if hasattr(self, "_train_sampler"):
            self._train_sampler.set_epoch(epoch)
        if self._resumed_logging is not None:  # the training loop has just zeroed what it had logged so far
            self._tr_loss = self._resumed_logging["tr_loss"].to(self.args.device)
            self._globalstep_last_logged = self._resumed_logging["last_logged"]
            self._resumed_logging = None
        super()._run_epoch(epoch=epoch, **kwargs)

    def _has_moving_reference(self) -> bool:
        return bool(self.args.sync_ref_model) and self.ref_model is not None

    @staticmethod
    def _resume_file(folder: str, process: int) -> str:
        return os.path.join(folder, f"rollout_state_{process}.pt")
