"""Completions of prompts at several temperatures, by transformers or vLLM, seeded by what is generated and nothing before it.

Both draw from ``softmax(logits / temperature)``, reshaped by `Sampling`'s own options alone: what a model's generation config
sets (Qwen's has top-k and a repetition penalty) is taken out, except for its end tokens.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

# Completions of one prompt: token ids up to the end token, temperature by temperature.
Completions = list[list[int]]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        temperatures: each positive.
        samples: completions at each of them.
        top_p, top_k, repetition_penalty: 1, 0 and 1 do nothing.
        max_tokens: budget of one completion, its end token included.
        eos_ids: token ids that end a completion.
        seed: of all of them.
    """

    temperatures: tuple[float, ...]
    samples: int
    top_p: float
    top_k: int
    repetition_penalty: float
    max_tokens: int
    eos_ids: tuple[int, ...]
    seed: int


class Sampler(Protocol):
    """Completions [B][temperatures * samples] of tokenised prompts [B], which are the rows `first_row`... of the data."""

    context_length: int | None  # tokens of prompt and completion together; None where no limit is known

    def __call__(self, prompts: Sequence[list[int]], first_row: int, sampling: Sampling) -> list[Completions]: ...


class TransformersSampler:
    """Generates with the model itself, one call for each temperature; leaves modes, settings and generators as they were."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.context_length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def __call__(self, prompts: Sequence[list[int]], first_row: int, sampling: Sampling) -> list[Completions]:
        device = self.model.device
        longest = max(map(len, prompts))
        # Masked, but not from the repetition penalty of every transformers: the row's own first token adds nothing to it.
        ids = torch.tensor([[row[0]] * (longest - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
        completions: list[Completions] = [[] for _ in prompts]
        cuda = [device] if device.type == "cuda" else []
        with _generating(self.model), torch.no_grad(), torch.random.fork_rng(cuda):
            for index, temperature in enumerate(sampling.temperatures):
                torch.manual_seed(derived_seed(sampling.seed, first_row, index))
                written = self.model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=_generation_config(sampling, temperature)
                )
                for i, row in enumerate(written[:, longest:].tolist()):
                    completions[i // sampling.samples].append(until_end(row, sampling.eos_ids))
        return completions


class VLLMSampler:
    """Generates with a `vllm.LLM`, one call for all temperatures, each request with a seed of its own."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.context_length: int | None = engine.llm_engine.model_config.max_model_len

    def __call__(self, prompts: Sequence[list[int]], first_row: int, sampling: Sampling) -> list[Completions]:
        requests, settings = [], []
        for row, prompt in enumerate(prompts, first_row):
            for index, temperature in enumerate(sampling.temperatures):
                for sample in range(sampling.samples):
                    requests.append({"prompt_token_ids": prompt})
                    settings.append(
                        _vllm().SamplingParams(
                            n=1,
                            temperature=temperature,
                            top_p=sampling.top_p,
                            top_k=sampling.top_k,
                            min_p=0.0,
                            repetition_penalty=sampling.repetition_penalty,
                            max_tokens=sampling.max_tokens,
                            stop_token_ids=list(sampling.eos_ids),
                            seed=derived_seed(sampling.seed, row, index, sample),
                            detokenize=False,
                        )
                    )
        outputs = self.engine.generate(requests, settings, use_tqdm=False)
        if [list(output.prompt_token_ids) for output in outputs] != [r["prompt_token_ids"] for r in requests]:
            raise ValueError("vLLM completed other prompts than those it was given: their order or their tokens changed")
        written = [until_end(list(output.outputs[0].token_ids), sampling.eos_ids) for output in outputs]
        count = len(sampling.temperatures) * sampling.samples
        return [written[i : i + count] for i in range(0, len(written), count)]


def make_engine(model: str, settings: dict[str, Any]) -> Any:
    """A `vllm.LLM` of the model at a path or hub id.

    Raises:
        ImportError: vLLM is not installed.
    """
    return _vllm().LLM(model=model, **settings)


def derived_seed(*parts: int) -> int:
    """One of 2^31 seeds for a tuple of integers, so that no generator's state has to be carried on."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def until_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Up to the first end token, which stays."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))
    return ids[: end + 1]


def end_tokens(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's end token and all that the model declares, such as an end of turn: as in TRL's GRPOTrainer."""
    declared = getattr(generation_config, "eos_token_id", None)
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(sorted({*own, *declared}))


def _generation_config(sampling: Sampling, temperature: float) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        max_new_tokens=sampling.max_tokens,
        num_return_sequences=sampling.samples,
        eos_token_id=list(sampling.eos_ids),
        pad_token_id=sampling.eos_ids[0],  # after the end token, and cut off with what follows it
    )


@contextlib.contextmanager
def _generating(model: Any) -> Iterator[None]:
    """In eval mode and without the model's own sampling settings, which would fill in whatever a call leaves out."""
    modes = [(module, module.training) for module in model.modules()]
    # PEFT's wrapper puts its own config into the model inside when it generates.
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    settings = [owner.generation_config for owner in owners]
    model.eval()
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, setting in zip(owners, settings, strict=True):
            owner.generation_config = setting
        for module, training in modes:
            module.training = training  # `train()` would reach the modules below, which have modes of their own


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as reason:
        raise ImportError(
            f"`use_vllm=True` needs vLLM, which cannot be imported here ({reason}): pip install vllm, or generate with "
            "transformers (`use_vllm=False`)"
        ) from reason
    return vllm
