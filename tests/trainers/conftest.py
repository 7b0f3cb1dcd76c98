"""Small random models, a character tokenizer and prompts of unequal length: everything is built here, nothing is downloaded."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the trl extra is not installed")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dppo_kernels.trainers import DPPOConfig, DPPOTrainer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<end>", "<unk>", "<u>", "<a>", "<t>", "<s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *string.printable])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<end>", "<u>", "<a>", "<t>", "<s>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def small_config(vocab: int, **changes: Any) -> Qwen3Config:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
    }
    return Qwen3Config(vocab_size=vocab, eos_token_id=1, pad_token_id=0, bos_token_id=None, **{**sizes, **changes})


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(small_config(len(tokenizer)))
    # Random weights give flat distributions; a scaled head gives the confident tokens that trust regions are about.
    model.lm_head.weight.data *= 12
    return model


@pytest.fixture
def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(0, 240, 7) for b in range(3)]})


def reward_length(completions: list[Any], **kwargs: Any) -> list[float]:
    """Varies within a group, so that advantages are not zero."""
    texts = [c if isinstance(c, str) else c[-1].get("content") or "" for c in completions]
    return [float(len(text) + 3 * text.count("1") + text.count("a")) for text in texts]


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DPPOConfig]:
    def make(cls: type = DPPOConfig, **changes: Any) -> Any:
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_generations": 4,
            "max_completion_length": 6,
            "steps_per_generation": 2,
            "num_iterations": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
        }
        return cls(**{**defaults, **changes})

    return make


@pytest.fixture
def make_trainer(model, tokenizer, prompts, make_config) -> Callable[..., DPPOTrainer]:
    def make(cls: type = DPPOTrainer, *, train_dataset: Any = None, reward: Any = reward_length, **changes: Any) -> Any:
        taken = {
            name: changes.pop(name)
            for name in (
                *("model", "eval_dataset", "peft_config", "rollout_func", "tools", "callbacks", "environment_factory"),
                *("reward_processing_classes", "ref_model", "reward_model", "value_model", "teacher", "optimizers"),
            )
            if name in changes
        }
        config_class = changes.pop("config_class", DPPOConfig)
        config = changes.pop("config", None) or make_config(config_class, **changes)
        policy = taken.pop("model", model)
        data = prompts if train_dataset is None else train_dataset
        return cls(policy, reward, config, train_dataset=data, processing_class=tokenizer, **taken)

    return make


@pytest.fixture
def tool_chats(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Callable[[int], str]]:
    """Prompts and a tool for TRL's own tool loop: some rows call it after their first turn, and one of them twice."""
    calls = {"n": 0}

    def fake_parse(tokenizer_: Any, ids: list[int], prefix: Any = None, tools: Any = None) -> dict[str, Any]:
        calls["n"] += 1
        message: dict[str, Any] = {"role": "assistant", "content": tokenizer_.decode(ids, skip_special_tokens=True)}
        if calls["n"] in (2, 3, 6):  # rows 1 and 2 of the first turn, then one row of the second
            message["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
        return message

    def add(a: int) -> str:
        """Add one.

        Args:
            a: A number.
        """
        return "42"

    monkeypatch.setattr("trl.trainer.grpo_trainer.parse_response", fake_parse)
    monkeypatch.setattr(tokenizer, "response_template", {"type": "object"}, raising=False)
    monkeypatch.setattr(tokenizer, "response_schema", {"type": "object"}, raising=False)
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{a}?"}] for a in range(64)]})
    return chats, add


def history(trainer: Any, key: str) -> list[float]:
    """Logged values of one metric, in order."""
    return [entry[key] for entry in trainer.state.log_history if entry.get(key) is not None]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
