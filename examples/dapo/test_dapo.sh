#!/usr/bin/env bash
# Two optimiser steps on ten problems with a 0.5B model: does everything work on this machine? Needs a GPU and the hub.
# Without either: dppo train dapo --config cpu_quick_test
set -euo pipefail
exec dppo train dapo --config qwen2.5_0.5b_quick_test \
  --model_name_or_path "${MODEL_PATH:-Qwen/Qwen2.5-0.5B-Instruct}" \
  --num_generations "${NUM_GENERATIONS:-2}" \
  --output_dir "${OUTPUT_DIR:-outputs/dapo-test}" \
  --report_to "${REPORT_TO:-tensorboard}" \
  "$@"
