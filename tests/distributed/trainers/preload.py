"""What every run imports, once. Nothing here may start a thread: its copies are forked."""

import gc
import importlib
import importlib.util
import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of them has threads

if importlib.util.find_spec("deepspeed") is not None:  # runs that need it say so themselves
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # with it, half of torch's compiler
importlib.import_module("tests.distributed.trainers.runs")
gc.collect()
gc.freeze()  # runs need not look through all of it again
