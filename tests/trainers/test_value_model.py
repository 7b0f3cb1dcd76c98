"""Value models: which are taken, where the default comes from, and which token a value belongs to."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForTokenClassification, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from dppo_kernels.trainers.value_model import SharedHead, TokenValues, check_disjoint, make_value_model
from tests.trainers.conftest import small_config
from tests.trainers.ppo_runs import value_model

VOCAB = 40


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences, the second with three tokens of padding on the left."""
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    return ids, mask


def test_a_value_is_that_of_the_state_before_its_token(batch) -> None:
    ids, mask = batch
    values = TokenValues(value_model(VOCAB).eval())
    with torch.no_grad():
        found = values(ids, mask, 4)
        logits = values.model(input_ids=ids[:1]).logits[0, :, 0]
    assert found.shape == (2, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], logits[4:8])
    for t in range(4):
        changed = ids.clone()
        changed[:, 5 + t :] = 3 + (changed[:, 5 + t :] + 1) % (VOCAB - 3)
        with torch.no_grad():
            after = values(changed, mask, 4)
        assert torch.equal(after[:, : t + 1], found[:, : t + 1]), t  # what comes after a state does not change its value
        assert t == 3 or not torch.equal(after[:, t + 1], found[:, t + 1])


def test_left_padding_changes_nothing(batch) -> None:
    ids, mask = batch
    for kind in ("qwen", "gpt2"):
        if kind == "qwen":
            model = value_model(VOCAB)
        else:  # absolute positions
            from transformers import GPT2Config, GPT2ForTokenClassification

            torch.manual_seed(0)
            model = GPT2ForTokenClassification(
                GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2, num_labels=1)
            )
        values = TokenValues(model.eval())
        with torch.no_grad():
            torch.testing.assert_close(values(ids, mask, 4)[1:], values(ids[1:, 3:], mask[1:, 3:], 4), msg=kind)


def test_sequence_classification_values_every_token(batch) -> None:
    ids, mask = batch
    by_token = value_model(VOCAB)
    by_sequence = Qwen3ForSequenceClassification(small_config(VOCAB, num_labels=1))
    by_sequence.base_model.load_state_dict(by_token.base_model.state_dict())
    by_sequence.score.weight.data.copy_(by_token.score.weight.data)
    by_token.score.bias.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(
            TokenValues(by_sequence.eval())(ids, mask, 4), TokenValues(by_token.eval())(ids, mask, 4), rtol=0, atol=1e-6
        )


def test_the_default_is_a_copy_of_the_backbone_that_says_zero(batch) -> None:
    ids, mask = batch
    policy = Qwen3ForCausalLM(small_config(VOCAB))
    state = torch.get_rng_state()
    values = make_value_model(None, policy)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert values(ids, mask, 4).abs().max() == 0
    for name, p in policy.base_model.named_parameters():
        copied = values.model.base_model.get_parameter(name)
        assert torch.equal(copied, p)
        assert copied.data_ptr() != p.data_ptr()
    check_disjoint("value_model", values, [("the policy", policy)])
    assert policy.config.num_labels == 2  # as it was


def test_by_path_and_under_peft(batch, tmp_path) -> None:
    ids, mask = batch
    policy = Qwen3ForCausalLM(small_config(VOCAB))
    policy.save_pretrained(tmp_path / "policy")
    policy = Qwen3ForCausalLM.from_pretrained(tmp_path / "policy")
    adapted = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"]))
    values = make_value_model(None, adapted)
    weight = values.model.base_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, Qwen3ForCausalLM.from_pretrained(tmp_path / "policy").model.layers[0].self_attn.q_proj.weight)
    nowhere = get_peft_model(Qwen3ForCausalLM(small_config(VOCAB)), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="is loaded again from its path, and this one has none: pass a `value_model`"):
        make_value_model(None, nowhere)
    by_token = value_model(VOCAB)
    by_token.save_pretrained(tmp_path / "values")
    loaded = make_value_model(str(tmp_path / "values"), policy)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids, mask, 4), TokenValues(by_token.eval())(ids, mask, 4))
    lora = get_peft_model(value_model(VOCAB), LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        lora.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.normal_()
        adapted_values = TokenValues(lora.eval())
        before = adapted_values(ids, mask, 4)
        adapted_values.save(str(tmp_path / "adapter"))
        lora.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.zero_()
        assert not torch.equal(adapted_values(ids, mask, 4), before)
        adapted_values.load(str(tmp_path / "adapter"))
        assert torch.equal(adapted_values(ids, mask, 4), before)


def test_saved_values_are_the_same_bits(batch, tmp_path) -> None:
    ids, mask = batch
    values, other = TokenValues(value_model(VOCAB).eval()), TokenValues(value_model(VOCAB, seed=8).eval())
    values.save(str(tmp_path))
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.score.weight, values.model.score.weight)
    other.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(other(ids, mask, 4), values(ids, mask, 4))
    head, fresh = SharedHead(8), SharedHead(8)
    hidden = torch.randn(2, 3, 8)
    assert head(hidden).abs().max() == 0
    nn.init.normal_(head.linear.weight)
    head.save(str(tmp_path / "head"))
    fresh.load(str(tmp_path / "head"))
    assert torch.equal(fresh(hidden), head(hidden))
    assert head(hidden).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 1), TypeError, "must be a transformers or PEFT model or a path, got Linear"),
        (lambda: Qwen3ForCausalLM(small_config(VOCAB)), TypeError, "got Qwen3ForCausalLM: AutoModelForTokenClassification"),
        (lambda: AutoModelForTokenClassification.from_config(small_config(VOCAB)), ValueError, "must have one label, got 2"),
    ],
)
def test_other_models_are_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make_value_model(make(), None)


def test_no_default_for_an_architecture_without_classifiers() -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    policy = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            layer_types=["full_attention"],
        )
    )
    with pytest.raises(ValueError, match="neither token nor sequence classification for Lfm2ForCausalLM: pass a `value_model`"):
        make_value_model(None, policy)


def test_shared_parameters_are_found() -> None:
    values = TokenValues(value_model(VOCAB))
    policy = Qwen3ForCausalLM(small_config(VOCAB))
    check_disjoint("value_model", values, [("the policy", policy)])
    policy.model.layers[0] = values.model.model.layers[0]
    with pytest.raises(
        ValueError, match=r"`value_model` shares 11 parameters with the policy \(the first is 'model.model.layers.0"
    ):
        check_disjoint("value_model", values, [("the policy", policy)])
