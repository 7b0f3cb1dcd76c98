"""Value models in checkpoints: weights, optimiser, counters and the KL controller, saved and restored."""

import os
from typing import TYPE_CHECKING, Any

import torch

from dppo_kernels.trainers.value_model import FOLDER

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: GRPOTrainer comes after it in the bases


class ValueStateMixin(Host):
    """Put before `ExactResumeMixin` in the bases of a trainer with a `value_model`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and (_internal_call or self.args.save_value_model):
            self.value_model.save(os.path.join(output_dir or self.args.output_dir, FOLDER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = os.path.join(checkpoint, FOLDER)
            if not os.path.isdir(folder):
                raise ValueError(f"{checkpoint} holds no {FOLDER}: it is not a checkpoint of {type(self).__name__}")
            self.value_model.load(folder)
        super()._load_optimizer_and_scheduler(checkpoint)

    def extra_resume_state(self) -> dict[str, Any]:
        return {**super().extra_resume_state(), "early_stopped": self._early_stopped}

    def load_extra_resume_state(self, state: dict[str, Any]) -> None:
        super().load_extra_resume_state(state)
        self._early_stopped = state["early_stopped"]

    def portable_resume_state(self) -> dict[str, Any]:
        own = {"update_count": self.update_count, "kl_controller": self.kl_controller.state_dict()}
        return {**super().portable_resume_state(), **own}

    def load_portable_resume_state(self, state: dict[str, Any]) -> None:
        super().load_portable_resume_state(state)
        self.update_count = state["update_count"]
        self.kl_controller.load_state_dict(state["kl_controller"])


def save_optimizer(path: str, **parts: Any) -> None:
    """State dicts by name, in one file."""
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)


def load_optimizer(path: str, **parts: Any) -> None:
    """Receives what `save_optimizer` wrote."""
    states = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(states[name])
