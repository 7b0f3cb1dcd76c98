"""A real vLLM engine on CPU, one for the whole run: `make test-vllm` builds its environment.

vLLM's CPU build needs help to take weight updates and fp32: all of it is here, none in the library.
"""

import importlib.util
import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

NO_VLLM = "vllm is not installed here: `make test-vllm` runs these"
REQUIRED = os.environ.get("DPPO_REQUIRE_VLLM") == "1"  # set by `make test-vllm`: skipping everything is a failure there


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    if REQUIRED:
        raise pytest.UsageError(NO_VLLM)
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason=NO_VLLM))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if REQUIRED and exitstatus == 0 and reporter is not None and not reporter.stats.get("passed"):
        reporter.write_line("no test with vLLM ran")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


pytest.importorskip("trl", reason="the trl extra is not installed")  # as tests.trainers.conftest does, before it is imported

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3ForCausalLM  # noqa: E402

from tests.trainers.conftest import make_config, make_trainer, prompts, small_config, tokenizer  # noqa: E402, F401


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:  # noqa: F811
    """A tied model: a sync that reaches only one of head and embedding shows."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(small_config(len(tokenizer), **sizes))
    model.lm_head.weight.data *= 4  # more confident tokens; layers see the normalised embedding
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model(model_path: Path) -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


@pytest.fixture(scope="session")
def start_engine(model_path: Path) -> Iterator[Callable[..., Any]]:
    """Gives the one engine, whatever TRL asks for: only `max_num_seqs` differs between tests, and is large enough."""
    import vllm
    import vllm._custom_ops
    import vllm.model_executor.layers.utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not a CPU build")
    started: list[Any] = []

    def start(**settings: Any) -> Any:
        assert settings["model"] == str(model_path)
        assert settings["logprobs_mode"] == "processed_logprobs"
        assert "max_logprobs" not in settings
        if not started:
            started.append(vllm.LLM(**{**settings, "max_num_seqs": 32, "dtype": "float32", "enforce_eager": True}))
        engine = started[0]
        engine.llm_engine.model_config.max_logprobs = 20  # as a new one has it
        return engine

    with pytest.MonkeyPatch.context() as patch:
        # Prepacked weights would ignore a sync, without a word on tied embeddings.
        patch.setattr(vllm._custom_ops, "_supports_onednn", False)
        patch.setattr(vllm.model_executor.layers.utils, "check_cpu_sgl_kernel", lambda *args, **kwargs: False)
        yield start


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, start_engine: Callable[..., Any]) -> None:
    monkeypatch.setattr("trl.generation.vllm_generation.LLM", start_engine)
