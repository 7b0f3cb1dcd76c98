#!/usr/bin/env bash
# DAPO on DAPO-Math-17k. Settings come from the environment; further arguments go to `dppo train dapo` and win over them.
#   MODEL_PATH=Qwen/Qwen2.5-7B-Instruct NUM_GENERATIONS=8 examples/dapo/run_dapo.sh --use_vllm
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-0.5B-Instruct}
DATASET=${DATASET:-BytedTsinghua-SIA/DAPO-Math-17k}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/DAPO-TRL/$(basename "$MODEL_PATH")}
NUM_PROCESSES=${NUM_PROCESSES:-1}
NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-1}
LEARNING_RATE=${LEARNING_RATE:-1e-6}
PER_DEVICE_BATCH_SIZE=${PER_DEVICE_BATCH_SIZE:-1}
GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-32}
NUM_GENERATIONS=${NUM_GENERATIONS:-16}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-2048}
MAX_COMPLETION_LENGTH=${MAX_COMPLETION_LENGTH:-20480}
OVERLONG_BUFFER_LEN=${OVERLONG_BUFFER_LEN:-4096}
FILTER_GROUPS=${FILTER_GROUPS:-true}
MAX_FILTER_GEN_BATCHES=${MAX_FILTER_GEN_BATCHES:-10}
REPORT_TO=${REPORT_TO:-tensorboard}

command=(dppo)
if [ "$NUM_PROCESSES" -gt 1 ]; then
  command=(accelerate launch --multi_gpu --num_processes "$NUM_PROCESSES" -m dppo_kernels.trainers.cli)
fi
exec "${command[@]}" train dapo \
  --model_name_or_path "$MODEL_PATH" \
  --dtype bfloat16 \
  --dataset_name "$DATASET" \
  --output_dir "$OUTPUT_DIR" \
  --num_train_epochs "$NUM_TRAIN_EPOCHS" \
  --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" \
  --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS" \
  --learning_rate "$LEARNING_RATE" \
  --lr_scheduler_type constant_with_warmup \
  --warmup_steps 20 \
  --weight_decay 0.1 \
  --max_grad_norm 1.0 \
  --num_generations "$NUM_GENERATIONS" \
  --loss_type dapo \
  --epsilon 0.2 \
  --epsilon_high 0.28 \
  --beta 0.0 \
  --entropy_coeff 0.0 \
  --temperature 1.0 \
  --top_p 1.0 \
  --max_prompt_length "$MAX_PROMPT_LENGTH" \
  --max_completion_length "$MAX_COMPLETION_LENGTH" \
  --filter_groups_enable "$FILTER_GROUPS" \
  --max_filter_gen_batches "$MAX_FILTER_GEN_BATCHES" \
  --apply_overlong_penalty \
  --overlong_buffer_len "$OVERLONG_BUFFER_LEN" \
  --overlong_penalty_factor 1.0 \
  --bf16 \
  --logging_steps 1 \
  --report_to "$REPORT_TO" \
  "$@"
