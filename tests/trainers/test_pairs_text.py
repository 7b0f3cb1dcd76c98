"""What is sampled is what TRL's DPOTrainer trains on, token by token, where the parts of a text decode unlike the whole."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer

from dppo_kernels.trainers import PairsConfig, make_pairs
from dppo_kernels.trainers.pairs_text import tokenized_prompts
from tests.trainers.conftest import small_config

EOS, SPACE = 1, 4
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>LEAD{{ m.content }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def spaced() -> PreTrainedTokenizerFast:
    """Characters, spaces as ▁, one of them before a text that `decode` takes away: sentencepiece's way."""
    tokens = ["<pad>", "<eos>", "<u>", "<a>", "▁", *"0123+=?"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first", split=False), pre_tokenizers.Split("", "isolated")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=["<u>", "<a>"]
    )


@pytest.fixture
def small(spaced) -> Qwen3ForCausalLM:
    """Draws from a fixed distribution, and nothing that a text cannot hold."""
    model = Qwen3ForCausalLM(small_config(len(spaced)))
    model.lm_head.weight.data.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.tensor([-1e4, 0.0, -1e4, -1e4, 1.0, *[0.0] * 7]))
    return model


def trained_ids(model: Any, tokenizer: Any, pairs: Dataset, folder: Path) -> list[dict[str, list[int]]]:
    """The tokens that TRL makes of pairs."""
    args = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, max_steps=1, report_to=[], disable_tqdm=True)
    trainer = DPOTrainer(model, ref_model=copy.deepcopy(model), args=args, train_dataset=pairs, processing_class=tokenizer)
    return trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()


@pytest.mark.parametrize("lead", [None, "", " "], ids=["text", "chat", "chat with a space"])
def test_trl_trains_on_what_was_sampled(small, spaced, tmp_path: Path, lead: str | None) -> None:
    tokenizer = copy.deepcopy(spaced)
    tokenizer.chat_template = TEMPLATE.replace("LEAD", lead or "")
    prompts: list[Any] = ["1+1=", "2=", "3 +0="]
    if lead is not None:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    sampled: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        sampled.extend(completion_ids)
        return [float(-(i % 6)) for i in range(len(completion_ids))]

    config = PairsConfig(temperatures=[1.0], samples_per_temperature=6, max_completion_length=5)
    pairs, _ = make_pairs(small, tokenizer, prompts, reward, config)
    found = trained_ids(small, tokenizer, pairs, tmp_path)
    starts = []
    for row, ids in enumerate(found):
        for name, expected in (("chosen_ids", sampled[6 * row]), ("rejected_ids", sampled[6 * row + 5])):
            expected = expected if expected[-1] == EOS else [*expected, EOS]
            if lead == " " and expected[0] != SPACE:
                expected = [SPACE, *expected]  # no text makes this template leave its space out
            assert ids[name] == expected
            starts.append(expected[0] == SPACE)
    assert any(starts)


def test_chat_templates_get_tools_and_options_of_each_row(small, spaced, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(spaced)
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.name }}={% endfor %}{{ greeting or '' }}" + TEMPLATE
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "1+1"}]] * 4,
            "tools": ['[{"name": "2"}]', None, None, '[{"name": "3"}, {"name": "0"}]'],
            "chat_template_kwargs": [{"greeting": None}, {"greeting": "0"}, {}, {"greeting": "?"}],
        }
    )
    rendered = ["2=<u>1+1<a>", "0<u>1+1<a>", "<u>1+1<a>", "3=0=?<u>1+1<a>"]
    config = PairsConfig(temperatures=[1.0], samples_per_temperature=2, max_completion_length=3)
    pairs, _ = make_pairs(small, tokenizer, data, lambda completions, **kwargs: [1.0, 0.0] * 4, config)
    assert pairs["tools"][:] == data["tools"][:]
    assert [prompt.ids for prompt in tokenized_prompts(tokenizer, data)] == [tokenizer(text)["input_ids"] for text in rendered]
    found = trained_ids(small, tokenizer, pairs, tmp_path)
    assert [tokenizer.decode(ids["prompt_ids"]) for ids in found] == rendered


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"tools": ["[]", "add"]}, ValueError, "row 1: `tools` must be a list or JSON of one, got 'add'"),
        ({"tools": ["[]", "{}"]}, TypeError, "row 1: `tools` must be a list or JSON of one, got dict"),
        ({"chat_template_kwargs": ["x", "y"]}, TypeError, "row 0: `chat_template_kwargs` must be a dict, got str"),
        ({"chat_template_kwargs": [{"a": 1}, None]}, TypeError, "row 1: `chat_template_kwargs` must be a dict, got NoneType"),
    ],
)
def test_columns_that_no_template_takes(small, spaced, columns: dict[str, Any], error: type[Exception], message: str) -> None:
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1"}]] * 2, **columns})
    with pytest.raises(error, match=message):
        make_pairs(small, spaced, data, lambda **kwargs: pytest.fail("scored"), PairsConfig(max_completion_length=3))
