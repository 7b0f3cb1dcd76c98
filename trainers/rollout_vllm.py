"""Recording the rollout policy while vLLM generates: the log-probs it returns, looked up by token id.

TRL's VLLMGeneration asks vLLM for ``logprobs`` entries per token, and returns them with their ids; GRPOTrainer keeps the first
entry of each token, which is the sampled one only at ``logprobs=0``. The log-probs are vLLM's "processed" ones: those of
``logits / temperature``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, is_peft_model, set_seed

from dppo_kernels.trainers._trl_seam import check_vllm_attributes
from dppo_kernels.trainers.rollout_columns import CapturedLogprob, RolloutStore, ranked_columns

logger = get_logger(__name__)


def prepare_engine(trainer: Any, k: int) -> None:
    """Make the trainer's vLLM return what `k` columns need, on every process, and draw by the trainer's seed.

    Raises:
        ValueError: the server was launched so that it cannot, naming the flag; or tools need what TRL does not do.
    """
    generation = trainer.vllm_generation
    check_vllm_attributes(generation)
    sharing = trainer.accelerator.num_processes if generation.mode == "server" else generation.tensor_parallel_size
    if trainer.tools and sharing > 1:
        raise ValueError(
            f"`tools` with an engine that {sharing} processes share is not supported: TRL's tool loop calls it whenever one "
            "of them has tool calls, which hangs or mixes up completions. Use `vllm_mode='colocate'` with "
            "`vllm_tensor_parallel_size=1`"
        )
    generation.logprobs = k
    if generation.mode == "server":
        is_main = trainer.accelerator.is_main_process
        info = [generation.vllm_client.get_server_info() if is_main else None]
        broadcast_object_list(info, from_process=0)  # so that all processes refuse together
        check_server(info[0], k)
        # What a request leaves out, a server takes from the model's generation config.
        generation.generation_kwargs = {"presence_penalty": 0.0, "frequency_penalty": 0.0, **generation.generation_kwargs}
    else:
        allow_logprobs(generation.llm, k)
        # The engine samples from this process's generators, and seeded them with the rank alone when it was built. Processes
        # that hold parts of one engine must draw the same.
        set_seed(trainer.args.seed + trainer.accelerator.process_index // generation.tensor_parallel_size)


def warn_of_merging(model: Any) -> None:
    """An adapter on 16-bit weights loses a little of them at every sync."""
    if not is_peft_model(model):
        return
    dtypes = {weight.dtype for name, weight in model.named_parameters() if ".base_layer." in name}
    for dtype in sorted(map(str, dtypes & {torch.bfloat16, torch.float16})):
        logger.warning(
            f"an adapter on {dtype.removeprefix('torch.')} weights: at every sync with vLLM, TRL merges it into them and out "
            "again, which rounds them each time, and a checkpoint of the adapter does not hold what they became. Load the "
            "model in float32 to avoid it."
        )


def allow_logprobs(llm: Any, k: int) -> None:
    """Raise the engine's limit of log-probs per token, which TRL leaves at vLLM's 20; it only guards requests."""
    config = llm.llm_engine.model_config
    if 0 <= config.max_logprobs < k:
        config.max_logprobs = k


def check_server(info: Any, k: int) -> None:
    """Refuse a vLLM server whose log-probs are not those of ``softmax(logits / temperature)``, or too few.

    Raises:
        ValueError: naming the launch flag.
    """
    model = info["model_config"]
    if model["logprobs_mode"] != "processed_logprobs":
        raise ValueError(
            f"the vLLM server runs with `--logprobs-mode {model['logprobs_mode']}`, whose log-probs ignore the temperature: "
            "restart it with `--logprobs-mode processed_logprobs`"
        )
    if 0 <= model["max_logprobs"] < k:
        raise ValueError(
            f"the vLLM server returns at most {model['max_logprobs']} log-probs per token, `divergence_topk` is {k}: "
            f"restart it with `--max-logprobs {k}`, or -1 for any number"
        )
    for flag, value in (("logits-processors", model.get("logits_processors")), ("watermark", info.get("watermark_config"))):
        if value:
            raise ValueError(f"the vLLM server's `--{flag}` {value} reshapes the sampling distribution: restart it without")


def capturing(generate: Callable[..., Any], store: RolloutStore, vocab: int) -> Callable[..., Any]:
    """VLLMGeneration.generate with one log-prob per token, the sampled one's; columns go to `store`."""

    @functools.wraps(generate)
    def captured(prompts: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        prompt_ids, completion_ids, logprobs, ids = generate(prompts, *args, **kwargs)
        if [list(x) for x in prompt_ids] != [list(x) for x in prompts]:
            raise ValueError("vLLM completed other prompts than those it was given: their order or their tokens changed")
        if logprobs is None or ids is None:
            raise ValueError("vLLM returned no log-probs; the trust region is measured against them")
        captured = store_engine_rollout(store, completion_ids, ids, logprobs, vocab)
        sampled_ids = [[[i] for i in row] for row in completion_ids]
        return prompt_ids, completion_ids, [[[value] for value in row] for row in captured], sampled_ids

    return captured


def store_engine_rollout(
    store: RolloutStore,
    completion_ids: Sequence[Sequence[int]],
    ids: Sequence[Sequence[Sequence[int]]],
    logprobs: Sequence[Sequence[Sequence[float | None]]],
    vocab: int,
) -> list[list[CapturedLogprob]]:
    """Columns of completions [B][T] from entries [B][T][K or K+1]; returns the sampled tokens' log-probs.

    Raises:
        ValueError: entries that do not fit their tokens, with completion and token.
    """
    if not len(completion_ids) == len(ids) == len(logprobs):
        raise ValueError(
            f"vLLM returned {len(completion_ids)} completions, {len(ids)} lists of ids, {len(logprobs)} of log-probs"
        )
    stored = []
    for b, tokens in enumerate(completion_ids):
        place = f"completion {b} of vLLM"
        if not all(map(len, ids[b])):
            raise ValueError(f"{place} has a token without log-probs")
        sampled, columns = ranked_columns(tokens, ids[b], logprobs[b], k=store.k, vocab=vocab, place=place)
        first = store.add(*columns)
        stored.append([CapturedLogprob(value, first + t) for t, value in enumerate(sampled)])
    return stored
