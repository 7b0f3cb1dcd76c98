"""vLLM's side of TRL's VLLMGeneration and VLLMClient, played by a transformers model: their own code runs in between.

The engine holds weights of its own, scrambled until they are synced, so that a rollout by stale weights cannot go unnoticed.
"""

import copy
import functools
import math
import os
import socket
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.generation import vllm_client

# Of one token: entries {id: (log-prob, rank)} as vLLM makes them, and the sampled id.
Entries = dict[int, tuple[float, int]]
Mangle = Callable[[Entries, int], Entries]


# What a launcher of several processes set, if there is one. TRL sets the same for vLLM.
LAUNCHED = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}


class FakeEngine:
    """Draws from softmax(logits / temperature) and describes it as vLLM does: the sampled token first, then the top K."""

    def __init__(self, model: Any, *, max_logprobs: int = 20, heat: float = 1.0, mangle: Mangle | None = None) -> None:
        self.model = copy.deepcopy(model).eval()
        for p in self.model.parameters():
            p.data.normal_()
        self.max_logprobs, self.heat, self.mangle = max_logprobs, heat, mangle
        self.requests: list[dict[str, Any]] = []
        self.syncs = 0

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in weights:
            parameters[name].data.copy_(value)
            self.syncs += name == "model.norm.weight"

    def complete(self, prompt: list[int], request: dict[str, Any]) -> tuple[list[int], list[Entries]]:
        if request["logprobs"] > self.max_logprobs >= 0:
            raise ValueError(f"Requested sample logprobs of {request['logprobs']}, which is greater than {self.max_logprobs}")
        self.requests.append(request)
        eos = self.model.generation_config.eos_token_id
        ids, entries = list(prompt), []
        while len(entries) < request["max_tokens"] and (not entries or ids[-1] not in ([eos] if isinstance(eos, int) else eos)):
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            logprobs = torch.log_softmax(logits / (request["temperature"] * self.heat), -1)
            sampled = int(torch.multinomial(logprobs.exp(), 1))
            rank = int((logprobs > logprobs[sampled]).sum()) + 1
            entry = {sampled: (logprobs[sampled].item(), rank)}
            top = logprobs.topk(request["logprobs"])
            entry.update(
                {i: (v, r + 1) for r, (v, i) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True))}
            )
            entries.append(self.mangle(entry, sampled) if self.mangle else entry)
            ids.append(sampled)
        return ids[len(prompt) :], entries


class FakeLLM:
    """What VLLMGeneration touches of `vllm.LLM` in colocate mode."""

    def __init__(self, engine: FakeEngine, *, logprobs_mode: str, seed: int, **settings: Any) -> None:
        torch.manual_seed(seed)  # as vLLM's worker does, in the trainer's process
        assert logprobs_mode == "processed_logprobs"
        self.engine = engine
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=engine.load))
        self.llm_engine = SimpleNamespace(
            # The engine itself stands for its configuration: `max_logprobs` is read and raised there.
            model_config=engine,
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)),
        )
        engine.max_model_len = 128

    def generate(self, prompts: list[dict], sampling_params: SimpleNamespace, use_tqdm: bool) -> list[SimpleNamespace]:
        outputs = []
        for prompt in prompts:
            ids, entries = self.engine.complete(prompt["prompt_token_ids"], vars(sampling_params))
            described = [{i: SimpleNamespace(logprob=v, rank=r) for i, (v, r) in entry.items()} for entry in entries]
            completion = SimpleNamespace(token_ids=ids, logprobs=described)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[completion]))
        return outputs

    def reset_prefix_cache(self) -> None:
        pass


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class FakeClient(vllm_client.VLLMClient):
    """TRL's client with a server that is a function call away."""

    def __init__(self, engine: FakeEngine, info: dict[str, Any], **connection: Any) -> None:
        self.engine, self.info = engine, info
        engine.max_logprobs = info["model_config"]["max_logprobs"]
        self.base_url, self.model = "http://fake", "fake"

    def init_communicator(self, device: Any = 0) -> None:
        pass

    def get_server_info(self) -> dict[str, Any]:
        return self.info

    def update_named_params(self, metadata: list, named_params: Iterable[tuple[str, Tensor]]) -> None:
        self.engine.load(named_params)

    def reset_prefix_cache(self) -> None:
        pass

    def _post(self, url: str, json: dict[str, Any]) -> dict[str, Any]:
        assert url.endswith("/v1/completions")
        assert json["return_token_ids"]
        assert json["return_tokens_as_token_ids"]
        for name in ("temperature", "top_p", "top_k", "min_p", *PENALTIES):  # or the model's generation config decides
            assert json.get(name) is not None, name
        choices = []
        for prompt in json["prompt"]:
            for _ in range(json["n"]):
                ids, entries = self.engine.complete(prompt, json)
                logprobs = {
                    "tokens": [f"token_id:{i}" for i in ids],
                    "token_logprobs": [max(e[i][0], -9999.0) if i in e else -9999.0 for i, e in zip(ids, entries, strict=True)],
                    "top_logprobs": [{f"token_id:{i}": max(v, -9999.0) for i, (v, _) in e.items()} for e in entries],
                }
                choices.append({"token_ids": ids, "prompt_token_ids": prompt, "logprobs": logprobs})
        return {"choices": choices}


def server_info(**changes: Any) -> dict[str, Any]:
    model = {"logprobs_mode": "processed_logprobs", "max_logprobs": 20, "logits_processors": None}
    return {"model_config": {**model, **changes}, "watermark_config": None}


def install(patch: pytest.MonkeyPatch, engine: FakeEngine, info: dict[str, Any] | None = None) -> FakeEngine:
    """Give TRL this engine in both modes."""
    module = "trl.generation.vllm_generation"
    patch.setattr(f"{module}.is_vllm_available", lambda *args, **kwargs: True)
    patch.setattr(f"{module}.LLM", functools.partial(FakeLLM, engine), raising=False)
    patch.setattr(f"{module}.SamplingParams", SimpleNamespace, raising=False)
    patch.setattr(f"{module}.VLLMClient", functools.partial(FakeClient, engine, info or server_info(max_logprobs=-1)))
    # What TRL set for an engine before this one goes, or the next trainer would form a process group; and where one is formed,
    # its port is not the one that TRL tries first in every process of this machine.
    for name, value in LAUNCHED.items():
        patch.setenv(name, value or "")  # so that what TRL writes is undone
        if value is None:
            patch.delenv(name)
    if LAUNCHED["MASTER_PORT"] is None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            patch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    return engine


def impossible(entries: Entries, sampled: int) -> Entries:
    """The least likely entry that was not sampled, made impossible."""
    least = max((i for i in entries if i != sampled), key=lambda i: entries[i][1], default=None)
    return {i: (-math.inf, r) if i == least else (v, r) for i, (v, r) in entries.items()}
