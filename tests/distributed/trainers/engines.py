"""FSDP2 and DeepSpeed on CPUs, where they are meant for accelerators."""

import importlib
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState


def keep_fsdp() -> None:
    """accelerate shards on accelerators alone, and makes DDP of FSDP elsewhere: here it is told to keep it."""
    init = AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = patched


def build_nothing() -> None:
    """DeepSpeed compiles C++, which takes minutes, for messages between processes of one CPU: gloo sends them as well."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
