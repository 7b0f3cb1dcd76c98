"""The TRL and transformers internals the trainers rely on, the versions they were tested with, and one check at import.

TRL's trainers are extended by overriding private methods; a rename upstream must fail here, at import, and name what is gone.
"""

import importlib.metadata
import inspect

# Major and minor: at least the first, below the second.
SUPPORTED = {"trl": ((1, 16), (1, 17)), "transformers": ((5, 16), (5, 24))}

# Methods of GRPOTrainer that are overridden or called.
GRPO_TRAINER_METHODS = (
    "_calculate_rewards",
    "_clip_grad_norm",
    "_compute_loss",
    "_generate",
    "_generate_and_score_completions",
    "_generate_single_turn",
    "_get_grad_norm",
    "_get_learning_rate",
    "_get_output_dir",
    "_get_per_token_logps_and_entropies",
    "_get_train_sampler",
    "_load_optimizer_and_scheduler",
    "_prepare_inputs",
    "_push_from_checkpoint",
    "_run_epoch",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
    "_tokenize_prompts",
    "create_accelerator_and_postprocess",
    "get_high_entropy_mask",
)

# Attributes of a constructed GRPOTrainer that are read or set (`_tr_loss`, `_globalstep_last_logged` and
# `current_gradient_accumulation_steps` exist only while it trains).
GRPO_TRAINER_ATTRIBUTES = (
    "_buffered_inputs",
    "_entropy_bonus_enabled",
    "_is_vlm",
    "_logs",
    "_metrics",
    "_pending_extra_logs",
    "_step",
    "_tokenizer",
    "aux_loss_enabled",
    "beta",
    "entropy_coef",
    "environment_factories",
    "eos_token_ids",
    "epsilon_high",
    "epsilon_low",
    "importance_sampling_level",
    "loss_type",
    "max_completion_length",
    "model_wrapped",
    "num_generations",
    "num_iterations",
    "off_policy_mask_threshold",
    "ref_model",
    "reward_func_names",
    "reward_funcs",
    "reward_processing_classes",
    "reward_weights",
    "rollout_func",
    "router_aux_loss_coef",
    "shuffle_dataset",
    "temperature",
    "tools",
    "top_entropy_quantile",
    "use_adaptive_entropy",
    "use_vllm",
    "vllm_importance_sampling_correction",
)

# Of TRL's DPOTrainer: methods that are overridden, attributes that are read or set.
DPO_TRAINER_METHODS = (
    "_compute_loss",
    "_precompute_ref_logps",
    "_prepare_inputs",
    "_save_checkpoint",
    "compute_ref_log_probs",
    "create_accelerator_and_postprocess",
)
DPO_TRAINER_ATTRIBUTES = (
    "_is_vlm",
    "_metrics",
    "_precompute_model_hash",
    "_total_train_tokens",
    "_tp_size",
    "aux_loss_enabled",
    "loss_types",
    "precompute_ref_logps",
    "ref_model",
    "router_aux_loss_coef",
)

# Of a trainer with and without `use_vllm`.
VLLM_TRAINER_ATTRIBUTES = ("_last_loaded_step", "vllm_generation")
TRANSFORMERS_TRAINER_ATTRIBUTES = ("generation_config",)

# VLLMGeneration: what is called with which arguments, and what is read or set. It imports without vLLM.
VLLM_GENERATE_ARGUMENTS = ("self", "prompts", "images", "num_generations", "profiler")
VLLM_METHODS = ("generate", "sync_weights")
VLLM_ATTRIBUTES = ("generation_kwargs", "logprobs", "mode", "tensor_parallel_size")

# Of `transformers.integrations.deepspeed`: a weak reference to what makes models come divided under ZeRO-3.
ACTIVE_ZERO_CONFIG = "_hf_deepspeed_config_weak_ref"

# Looked up by the forward of every fused lm_head on each call: replacing them reaches trainers that exist already.
SCORING_FUNCTION = "_ChunkedLogProbFunction"
SCORES_LABELS_ONLY = "_use_triton"  # of a device: whether the forward drops ignored positions before it scores
GATHER_HEAD = "maybe_gather_lm_head_ctx"  # of weight and bias: holds ZeRO-3's partitions together while it is open

SCORING_ARGUMENTS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)


def supported_range(package: str) -> str:
    low, high = SUPPORTED[package]
    return f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"


def check_versions() -> None:
    """Raise ImportError unless TRL and transformers are installed in the tested range."""
    for package, (low, high) in SUPPORTED.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(
                f"dppo_kernels.trainers needs {package}{supported_range(package)}, which is not installed: "
                "pip install 'dppo-kernels[trl]'"
            ) from None
        if not low <= tuple(int(part) for part in found.split(".")[:2]) < high:
            raise ImportError(
                f"dppo_kernels.trainers was tested with {package}{supported_range(package)}; found {package} {found}"
            )


check_versions()

# After the check, so that its message comes first. All of transformers' mixtures of experts take their loss from Mixtral.
from transformers.integrations import deepspeed as zero_config  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402
from trl import DPOConfig as TRLDPOConfig  # noqa: E402
from trl import DPOTrainer as TRLDPOTrainer  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.generation.vllm_client import VLLMClient  # noqa: E402
from trl.generation.vllm_generation import VLLMGeneration  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed  # noqa: E402
from trl.trainer import utils as trainer_utils  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    RepeatSampler,
    create_model_from_path,
    shuffle_sequence_dict,
    split_tensor_dict,
    use_adapter,
)

for _owner, _names in (
    (GRPOTrainer, GRPO_TRAINER_METHODS),
    (TRLDPOTrainer, DPO_TRAINER_METHODS),
    (VLLMGeneration, VLLM_METHODS),
    (VLLMClient, ("get_server_info",)),
    (zero_config, (ACTIVE_ZERO_CONFIG, "set_hf_deepspeed_config", "unset_hf_deepspeed_config")),
):
    _missing = [f"{_owner.__name__}.{name}" for name in _names if not hasattr(_owner, name)]
    if _missing:
        _package = "transformers" if _owner is zero_config else "trl"
        raise ImportError(f"{_package} {importlib.metadata.version(_package)} lacks {', '.join(_missing)}")


def check_attributes(trainer: GRPOTrainer) -> None:
    """Raise ImportError if a constructed trainer lacks an attribute that this package relies on."""
    generation = VLLM_TRAINER_ATTRIBUTES if trainer.use_vllm else TRANSFORMERS_TRAINER_ATTRIBUTES
    missing = [name for name in (*GRPO_TRAINER_ATTRIBUTES, *generation) if not hasattr(trainer, name)]
    if missing:
        raise ImportError(f"GRPOTrainer of trl {importlib.metadata.version('trl')} sets no {', '.join(missing)}")


def check_dpo_attributes(trainer: TRLDPOTrainer) -> None:
    """Raise ImportError if a constructed DPOTrainer lacks an attribute that this package relies on."""
    missing = [name for name in DPO_TRAINER_ATTRIBUTES if not hasattr(trainer, name)]
    if missing:
        raise ImportError(f"DPOTrainer of trl {importlib.metadata.version('trl')} sets no {', '.join(missing)}")


def check_vllm_attributes(generation: VLLMGeneration) -> None:
    """Raise ImportError unless vLLM is driven through what this package relies on.

    The order of what `generate` returns shows at run time: sampled ids are looked up among the returned ones.
    """
    found = f"VLLMGeneration of trl {importlib.metadata.version('trl')}"
    engine = "vllm_client" if getattr(generation, "mode", None) == "server" else "llm"
    names = [*VLLM_ATTRIBUTES]
    if engine == "llm" or generation.accelerator.is_main_process:  # other processes have no client
        names.append(engine)
    missing = [name for name in names if not hasattr(generation, name)]
    if missing:
        raise ImportError(f"{found} sets no {', '.join(missing)}")
    arguments = tuple(inspect.signature(VLLMGeneration.generate).parameters)
    if arguments != VLLM_GENERATE_ARGUMENTS:
        raise ImportError(f"{found} generates from ({', '.join(arguments)}); expected ({', '.join(VLLM_GENERATE_ARGUMENTS)})")


def check_scoring() -> None:
    """Raise ImportError unless the functions that TRL scores with are there and called as this package expects."""
    found = f"trl {importlib.metadata.version('trl')}"
    missing = [name for name in (SCORING_FUNCTION, SCORES_LABELS_ONLY, GATHER_HEAD) if not hasattr(trainer_utils, name)]
    if missing:
        raise ImportError(f"{found} lacks trl.trainer.utils.{', trl.trainer.utils.'.join(missing)}")
    arguments = tuple(inspect.signature(getattr(trainer_utils, SCORING_FUNCTION).forward).parameters)
    if arguments != SCORING_ARGUMENTS:
        raise ImportError(
            f"trl.trainer.utils.{SCORING_FUNCTION} of {found} takes ({', '.join(arguments)}); "
            f"expected ({', '.join(SCORING_ARGUMENTS)})"
        )


__all__ = [
    "ACTIVE_ZERO_CONFIG",
    "GATHER_HEAD",
    "SCORES_LABELS_ONLY",
    "SCORING_FUNCTION",
    "SUPPORTED",
    "GRPOConfig",
    "GRPOTrainer",
    "RepeatSampler",
    "TRLDPOConfig",
    "TRLDPOTrainer",
    "check_attributes",
    "check_dpo_attributes",
    "check_scoring",
    "check_versions",
    "check_vllm_attributes",
    "create_model_from_path",
    "disable_gradient_checkpointing",
    "load_balancing_loss_func",
    "prepare_deepspeed",
    "shuffle_sequence_dict",
    "split_tensor_dict",
    "supported_range",
    "trainer_utils",
    "use_adapter",
    "zero_config",
]
