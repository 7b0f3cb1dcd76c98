"""A run whose second rank dies within its fifth step: ``torchrun -m tests.distributed.trainers.killed WRAPPER FOLDER``."""

import os
import signal
import sys
from typing import Any

from tests.distributed.trainers import runs

if __name__ == "__main__":
    trainer = runs.make("dppo", sys.argv[1], sys.argv[2], save_strategy="steps", save_steps=3)
    compute = trainer._compute_loss

    def until(*args: Any, **options: Any) -> Any:
        loss = compute(*args, **options)
        if trainer.state.global_step == 4 and trainer.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # after the forward, before the backward
        return loss

    trainer._compute_loss = until
    trainer.train()
    print("trained to the end")
