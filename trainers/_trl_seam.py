"""Every TRL and transformers internal the trainers rely on, the versions they were tested with, and one check at import.

TRL's trainers are extended by overriding private methods; a rename upstream must fail here, at import, and name what is gone.
"""

import importlib.metadata

from packaging.version import Version

TRL_RANGE = ("1.16", "1.17")  # >=, <
TRANSFORMERS_RANGE = ("5.16", "5.24")  # >=, <

# Overridden or called, by the class that must have it.
GRPO_TRAINER_METHODS = (
    "_calculate_rewards",
    "_compute_loss",
    "_generate",
    "_generate_and_score_completions",
    "_generate_single_turn",
    "_get_per_token_logps_and_entropies",
    "_get_train_sampler",
    "_load_optimizer_and_scheduler",
    "_prepare_inputs",
    "_run_epoch",
    "_save_rng_state",
    "get_high_entropy_mask",
)


def check_versions() -> None:
    """Raise ImportError unless TRL and transformers are installed in the tested range."""
    for package, (low, high) in {"trl": TRL_RANGE, "transformers": TRANSFORMERS_RANGE}.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(
                f"dppo_kernels.trainers needs {package}>={low},<{high}, which is not installed: pip install 'dppo-kernels[trl]'"
            ) from None
        if not Version(low) <= Version(found) < Version(high):
            raise ImportError(f"dppo_kernels.trainers was tested with {package}>={low},<{high}; found {package} {found}")


check_versions()

from trl import GRPOConfig, GRPOTrainer  # noqa: E402  (after the check, so that its message comes first)
from trl.trainer.utils import RepeatSampler, pad  # noqa: E402

_missing = [name for name in GRPO_TRAINER_METHODS if not hasattr(GRPOTrainer, name)]
if _missing:
    raise ImportError(f"trl {importlib.metadata.version('trl')} lacks GRPOTrainer.{', GRPOTrainer.'.join(_missing)}")

__all__ = ["GRPOConfig", "GRPOTrainer", "RepeatSampler", "check_versions", "pad"]
