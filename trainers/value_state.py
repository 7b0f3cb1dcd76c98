"""Value models in checkpoints: weights, optimiser, counters and the KL controller, saved and restored."""

import os
from typing import TYPE_CHECKING, Any

import torch

from dppo_kernels.trainers.sharding import unpartitioned
from dppo_kernels.trainers.value_model import FOLDER

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: GRPOTrainer comes after it in the bases


OPTIMIZER_FILE = "value_optimizer.pt"


class ValueStateMixin(Host):
    """Put before `ExactResumeMixin` in the bases of a trainer with a `value_model`."""

    value_optimizer: torch.optim.Optimizer | None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and (_internal_call or self.args.save_value_model):
            self.value_model.save(os.path.join(output_dir or self.args.output_dir, FOLDER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = os.path.join(checkpoint, FOLDER)
            if not os.path.isdir(folder):
                raise ValueError(f"{checkpoint} holds no {FOLDER}: it is not a checkpoint of {type(self).__name__}")
            with unpartitioned():
                self.value_model.load(folder)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (parts := self.value_optimizer_parts()):
            path = os.path.join(checkpoint, OPTIMIZER_FILE)
            if not os.path.isfile(path):
                raise ValueError(
                    f"{checkpoint} holds no {OPTIMIZER_FILE}: its value model was stepped by the policy's optimiser. Resume "
                    "with the trainer and the engine (none, DDP, FSDP or DeepSpeed) that saved it"
                )
            states = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(states[name])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and (parts := self.value_optimizer_parts()):
            torch.save({name: part.state_dict() for name, part in parts.items()}, os.path.join(output_dir, OPTIMIZER_FILE))

    def value_optimizer_parts(self) -> dict[str, Any]:
        """What steps the value model by itself, by name: none where the policy's optimiser holds it."""
        return {} if self.value_optimizer is None else {"optimizer": self.value_optimizer}

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
