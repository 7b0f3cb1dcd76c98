"""Checkpoints that are there whole or not at all: written aside, then renamed.

transformers writes into `checkpoint-N` itself: a run that is killed while it saves leaves a folder that resuming would take for
the last checkpoint, and could not load.
"""

import os
import shutil
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: GRPOTrainer comes after it in the bases

UNFINISHED = "_unfinished"  # folder beside the checkpoints; pushes to the hub leave out what starts with "_"
TRAINER_STATE = "trainer_state.json"


class AtomicCheckpointMixin(Host):
    """Put before GRPOTrainer in the bases. A run that is killed leaves the checkpoints that were complete.

    (One of an earlier run at the same step is gone from the moment before the new one takes its place.)
    """

    _aside = False  # whether a checkpoint is being written
    _to_push: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._aside else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside:  # uploads go on in the background, from where the checkpoint will lie
            self._to_push = checkpoint_folder
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = self._get_output_dir(trial)
        aside = os.path.join(folder, UNFINISHED)
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside, self._to_push = True, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = False
        written, final = os.path.join(aside, name), os.path.join(folder, name)
        if self.state.best_model_checkpoint == written:
            self.state.best_model_checkpoint = final
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            self.state.save_to_json(os.path.join(written, TRAINER_STATE))
            if os.path.isdir(final):  # of an earlier run that came this far
                os.replace(final, os.path.join(aside, "replaced"))
            os.replace(written, final)
            shutil.rmtree(aside)
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self._to_push is not None:
            self._push_from_checkpoint(final)
