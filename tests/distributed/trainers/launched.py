"""``dppo`` as `accelerate launch` starts it, on CPUs: arguments are those of the command, and one line says how it ran."""

import sys

from accelerate.utils import parse_flag_from_env

from tests.distributed.trainers.engines import build_nothing, keep_fsdp

if __name__ == "__main__":
    keep_fsdp()
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        build_nothing()
    from dppo_kernels.trainers.train import train

    trainer = train(sys.argv[1], sys.argv[2:])
    engine, state = trainer.accelerator, trainer.state
    kind = f"{type(trainer.model_wrapped).__name__}, {engine.distributed_type.value}"
    print(f"ran rank {engine.process_index} of {engine.num_processes}: {kind}, {state.global_step} steps", flush=True)
