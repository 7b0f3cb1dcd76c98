"""Ratios compare with ``softmax(logits / temperature)``: refuse samplers that draw from anything else.

Top-p, penalties and masks renormalise the distribution that tokens are drawn from, while the trainer normalises over the full
vocabulary, so every ratio would be biased even on unchanged weights.
"""

from collections.abc import Mapping
from typing import Any

# Generation settings that reshape the distribution tokens are drawn from, and the values at which they do nothing.
NEUTRAL_FOR_TRANSFORMERS: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "do_sample": (True,),
    "num_return_sequences": (None, 1),
    "return_dict_in_generate": (None, False),
    "num_beams": (None, 1),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
}
# None is no value for vLLM: a server takes the default of the model's generation config in its place.
NEUTRAL_FOR_VLLM: dict[str, tuple[Any, ...]] = {
    "top_k": (-1, 0),
    "top_p": (1.0,),
    "min_p": (None, 0.0),  # TRL sends 0 for None
    "repetition_penalty": (1.0,),
    "min_tokens": (None, 0),  # hides EOS
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "logit_bias": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "vllm_structured_outputs_regex": (None,),
    "logits_processors": (None,),
    "extra_args": (None,),  # arguments of custom logits processors
    "thinking_token_budget": (None,),
    "watermarking": (None, False),
}

# What else may stand in `generation_kwargs` for vLLM: it ends or describes a completion, and changes no probability.
_HARMLESS_FOR_VLLM = (
    *("max_tokens", "stop", "stop_token_ids", "ignore_eos", "temperature", "skip_reading_prefix_cache"),
    *("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
)
# How completions and log-probs come back is the trainer's business.
_SET_BY_THE_TRAINER = (
    *("n", "best_of", "logprobs", "prompt_logprobs", "top_logprobs", "flat_logprobs", "logprob_token_ids"),
    *("return_token_ids", "return_tokens_as_token_ids", "output_kind", "stream", "echo", "model", "prompt"),
)

VLLM_MIN_TEMPERATURE = 0.01  # vLLM raises what is lower to this, with a warning only


def check_sampling(
    settings: Mapping[str, Any], temperature: float, neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL_FOR_TRANSFORMERS
) -> None:
    """Refuse generation settings under which the sampler is not ``softmax(logits / temperature)``.

    Raises:
        ValueError: naming the setting, its value and the neutral one.
    """
    for name, values in neutral.items():
        if name in settings and settings[name] not in values:
            raise ValueError(
                f"`{name}`={settings[name]!r} reshapes the sampling distribution, but ratios and divergences compare "
                f"full-vocabulary log-probs: every ratio would be biased even on unchanged weights. Set it to {values[-1]!r}."
            )
    if settings.get("temperature", temperature) not in (None, temperature):
        raise ValueError(
            f"generation runs at temperature {settings['temperature']}, training at {temperature}: set `temperature` only"
        )


def check_vllm_sampling(settings: Mapping[str, Any], generation_kwargs: Mapping[str, Any] | None, temperature: float) -> None:
    """`check_sampling` for vLLM: the trainer's `settings`, and `generation_kwargs` that go to its ``SamplingParams``.

    Raises:
        ValueError: naming the setting; also for one whose effect is not known here.
    """
    check_sampling(settings, temperature, NEUTRAL_FOR_VLLM)
    if temperature < VLLM_MIN_TEMPERATURE:
        raise ValueError(f"`temperature` must be at least {VLLM_MIN_TEMPERATURE} with vLLM, got {temperature}: it raises it")
    extra = generation_kwargs or {}
    check_sampling(extra, temperature, NEUTRAL_FOR_VLLM)
    if "temperature" in extra and extra["temperature"] is None:
        raise ValueError("`generation_kwargs` holds `temperature`=None, in whose place a server takes the model's default")
    for name, value in extra.items():
        if name == "seed":
            raise ValueError(
                f"`generation_kwargs` must not hold `seed` (got {value!r}): vLLM would draw the same completion for all "
                "copies of a prompt, so that no group has an advantage"
            )
        if name in _SET_BY_THE_TRAINER:
            raise ValueError(
                f"`generation_kwargs` must not hold `{name}` (got {value!r}): the trainer asks for the log-probs it needs, one "
                "completion per prompt, and reads them by token id"
            )
        if name not in NEUTRAL_FOR_VLLM and name not in _HARMLESS_FOR_VLLM:
            raise ValueError(
                f"`generation_kwargs` holds `{name}`={value!r}, which is not known to leave vLLM's sampling distribution and "
                f"prompts as they are; known are {', '.join(_HARMLESS_FOR_VLLM)}"
            )
