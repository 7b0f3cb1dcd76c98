"""``dppo`` as `accelerate launch` starts it, on CPUs: arguments are those of the command, and one line says how it ran."""

import sys

from tests.distributed.trainers import preload, runs

if __name__ == "__main__":
    assert preload
    runs.keep_fsdp()
    from dppo_kernels.trainers.train import train

    trainer = train(sys.argv[1], sys.argv[2:])
    engine, state = trainer.accelerator, trainer.state
    kind = f"{type(trainer.model_wrapped).__name__}, {engine.distributed_type.value}"
    print(f"ran rank {engine.process_index} of {engine.num_processes}: {kind}, {state.global_step} steps", flush=True)
