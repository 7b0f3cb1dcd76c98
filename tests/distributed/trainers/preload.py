"""What every run imports, once. Nothing here may start a thread: its copies are forked."""

import importlib
import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}

# A C++ build of minutes, for messages between processes of one CPU: gloo sends them as well.
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]

importlib.import_module("tests.distributed.trainers.runs")
