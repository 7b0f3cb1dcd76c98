"""Exact resume for trainers on GRPOTrainer: what TRL 1.16 leaves out of a checkpoint, saved and restored.

TRL restores neither its micro-step counter nor the buffered rollouts, so a run saved inside a generation window starts a new
one; and its sampler restarts from the first epoch's permutation. With this mixin, training N + M steps and training N, saving,
loading and training M give the same bits.
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

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {
            "world_size": self.accelerator.num_processes,
            "step": self._step,
            "buffered_inputs": self._buffered_inputs,
            "metrics": {mode: dict(metrics) for mode, metrics in self._metrics.items()},
            "extra": self.extra_resume_state(),
        }
        os.makedirs(output_dir, exist_ok=True)
        torch.save(state, self._resume_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._resume_file(checkpoint)
        if not os.path.isfile(path):
            logger.warning(f"{path} is missing: the run continues, but not exactly (a new rollout is generated)")
            return
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        if state["world_size"] != self.accelerator.num_processes:
            logger.warning(
                f"{path} was saved by {state['world_size']} processes, this run has {self.accelerator.num_processes}: "
                "buffered rollouts are dropped and a new one is generated"
            )
            return
        self._step = state["step"]
        self._buffered_inputs = state["buffered_inputs"]
        for mode, metrics in state["metrics"].items():
            self._metrics[mode].update(metrics)
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
        super()._run_epoch(epoch=epoch, **kwargs)

    def _resume_file(self, folder: str) -> str:
        return os.path.join(folder, f"rollout_state_{self.accelerator.process_index}.pt")
