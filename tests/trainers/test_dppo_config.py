"""DPPOConfig: the loss it describes, and every refusal with its reason."""

import pytest

from dppo_kernels import PRESETS
from dppo_kernels.trainers import DPPOConfig


@pytest.mark.parametrize("kind", ["binary_tv", "binary_kl", "topk_tv", "topk_kl"])
def test_defaults_are_the_presets(make_config, kind: str) -> None:
    # Only matters where beta is not 0: GRPOConfig 1.16 weights the reference KL by the ratio by default.
    assert make_config(divergence_type=kind).policy_loss_spec() == PRESETS[f"dppo_{kind}"].replace(kl_ratio_weighted=True)


def test_settings_reach_the_spec(make_config) -> None:
    spec = make_config(
        epsilon=0.1, beta=0.04, use_bias_correction_kl=True, entropy_coef=0.01, clip_ratio_c=3.0
    ).policy_loss_spec()
    assert (spec.epsilon_low, spec.epsilon_high, spec.ratio_cap) == (0.1, 0.1, 3.0)
    assert (spec.beta, spec.kl_ratio_weighted, spec.entropy_coef) == (0.04, True, 0.01)
    spec = make_config(epsilon=0.1, epsilon_high=0.3, clip_ratio_c=None).policy_loss_spec()
    assert (spec.epsilon_low, spec.epsilon_high, spec.ratio_cap) == (0.1, 0.3, None)
    assert make_config(epsilon_high=0.3).policy_loss_spec().epsilon_low == 0.15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence_type": "tv"}, "`divergence_type` must be one of 'binary_tv'"),
        ({"divergence_topk": 0}, r"`divergence_topk` must be an int in \[1, 128\], got 0"),
        ({"divergence_topk": 129}, "got 129"),
        ({"divergence_topk": 4.0}, "must be an int in"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` adds noise to every forward"),
        ({"epsilon": 0.0}, "`epsilon` must be positive"),
        ({"epsilon_high": -0.1}, "`epsilon_high` must be positive"),
        ({"clip_ratio_c": 0.0}, "`clip_ratio_c` must be positive"),
        ({"top_p": 0.9}, "`top_p`=0.9 reshapes the sampling distribution"),
        ({"top_k": 50}, "`top_k`=50 reshapes"),
        ({"min_p": 0.1}, "`min_p`=0.1 reshapes"),
        ({"repetition_penalty": 1.2}, "`repetition_penalty`=1.2 reshapes"),
        ({"loss_type": "grpo"}, "`loss_type`='grpo' would be ignored"),
        ({"delta": 2.0}, "`delta`=2.0 would be ignored"),
        ({"importance_sampling_level": "sequence"}, "`importance_sampling_level`='sequence' would be ignored"),
        ({"off_policy_mask_threshold": 0.5}, "`off_policy_mask_threshold`=0.5 would be ignored"),
        ({"sapo_temperature_pos": 2.0}, "`sapo_temperature_pos`=2.0 would be ignored"),
        ({"vespo_k_pos": 9.0}, "`vespo_k_pos`=9.0 would be ignored"),
        ({"use_adaptive_entropy": True}, "`use_adaptive_entropy`=True would be ignored"),
        ({"vllm_importance_sampling_correction": True}, "would correct twice"),
        ({"mismatch_threshold": 0.0}, "`mismatch_threshold` must be positive"),
        ({"mismatch_action": "shout"}, "`mismatch_action` must be one of 'warn', 'stop'"),
        ({"use_transformers_continuous_batching": True}, "returns no log-probs"),
        ({"top_entropy_quantile": 0.5, "entropy_coef": 0.1}, "together with `entropy_coef`"),
    ],
)
def test_refusals_name_the_setting_and_the_reason(make_config, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_it_is_parsed_from_a_command_line(tmp_path) -> None:
    from transformers import HfArgumentParser

    (config,) = HfArgumentParser(DPPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--divergence_type", "topk_kl", "--epsilon", "0.07", "--use_cpu", "--bf16", "false"]
    )
    assert config.policy_loss_spec().epsilon_high == 0.07
