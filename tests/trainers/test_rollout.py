"""What the rollout records: equal to recomputing it, aligned with tokens through tool turns, refused where it is missing."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from dppo_kernels import _ext
from dppo_kernels.token_logprobs import topk, topk_native
from dppo_kernels.trainers.neutral_sampling import check_sampling
from dppo_kernels.trainers.rollout import check_custom_logprobs, store_custom_rollout
from dppo_kernels.trainers.rollout_columns import CapturedLogprob, RolloutStore
from tests.trainers.conftest import history
from tests.trainers.test_dppo_trainer import Recording, full_logits, loss_from_full_logits


def check_recorded_columns(trainer: Any, record: dict[str, Any], k: int, atol: float = 1e-5) -> None:
    """Against the full distribution of the weights that generated (the record's own, at the first micro-step)."""
    inputs = record["inputs"]
    trainer.model.load_state_dict(record["state"])
    with torch.no_grad():
        log_mu = torch.log_softmax(full_logits(trainer.model, inputs) / trainer.temperature, -1)
    active = inputs["completion_mask"].bool()
    if "tool_mask" in inputs:
        assert not inputs["rollout_topk_valid"][~inputs["tool_mask"].bool()].any()
        active &= inputs["tool_mask"].bool()
    sampled = inputs["completion_ids"][active]
    close = {"rtol": 0, "atol": atol}
    expected = log_mu[active].gather(1, sampled[:, None]).squeeze(1)
    torch.testing.assert_close(inputs["sampling_per_token_logps"][active].double(), expected, **close)
    top_ids, top_logprobs, valid = (inputs[f"rollout_topk_{name}"][active] for name in ("ids", "logprobs", "valid"))
    torch.testing.assert_close(top_logprobs[:, :k].double(), log_mu[active].topk(k).values, **close)
    assert (top_ids == sampled[:, None]).any(1).all()
    assert valid[:, :k].all()
    assert torch.equal(valid[:, k], ~(top_ids[:, :k] == sampled[:, None]).any(1))
    for row, ok in zip(top_ids, valid, strict=True):
        assert len(set(row[ok].tolist())) == int(ok.sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("pad_to", [None, 8])
def test_recorded_columns_equal_recomputed_ones(make_trainer, temperature: float, pad_to: int | None) -> None:
    trainer = make_trainer(
        Recording, divergence_type="topk_tv", divergence_topk=3, temperature=temperature, pad_to_multiple_of=pad_to,
        per_device_train_batch_size=8, max_steps=1,
    )  # fmt: skip
    trainer.train()
    check_recorded_columns(trainer, trainer.recorded[0], 3)


@pytest.mark.skipif(not _ext.CPU.loaded, reason=f"C++ extension: {_ext.CPU.reason}")
def test_every_step_goes_through_the_extension(make_trainer, monkeypatch) -> None:
    calls = []

    def counted(logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(logits.shape)
        return topk_native.topk_logprobs_cpp(logits, *arguments, **options)

    monkeypatch.setattr(topk, "topk_logprobs_cpp", counted)
    trainer = make_trainer(Recording, divergence_type="topk_tv", divergence_topk=3, max_steps=1)
    trainer.train()
    inputs = trainer.recorded[0]["inputs"]
    assert len(calls) == inputs["completion_ids"].shape[1]
    assert set(calls) == {(8, trainer.model.config.vocab_size)}


def test_generate_is_restored_and_memory_is_columns_only(make_trainer, model) -> None:
    trainer = make_trainer(Recording, divergence_type="topk_tv", divergence_topk=3, max_steps=1)
    trainer.train()
    assert "generate" not in vars(model)
    vocab = model.config.vocab_size
    inputs = trainer.recorded[0]["inputs"]
    assert all(x.shape[-1] != vocab for x in inputs.values() if isinstance(x, torch.Tensor) and x.dim())
    assert inputs["rollout_topk_ids"].shape == (*inputs["completion_ids"].shape, 4)


@pytest.mark.parametrize("kind", ["topk_tv", "binary_kl"])
def test_tool_turns_stay_aligned_and_masked(make_trainer, tool_chats, kind: str) -> None:
    """TRL's own tool loop: some rows call a tool after their first turn, and one of them twice."""
    chats, add = tool_chats
    trainer = make_trainer(
        Recording, train_dataset=chats, tools=[add], divergence_type=kind, divergence_topk=3, max_steps=2,
        max_completion_length=24, steps_per_generation=1, num_iterations=2, per_device_train_batch_size=4,
        generation_kwargs={"max_new_tokens": 5}, learning_rate=3e-2,
    )  # fmt: skip
    trainer.train()
    first = trainer.recorded[0]
    tool_mask = first["inputs"]["tool_mask"].bool() | ~first["inputs"]["completion_mask"].bool()
    assert (~tool_mask).any(1).sum() == 2  # two rows hold tool tokens
    assert first["inputs"]["num_items_in_batch"] == (first["inputs"]["completion_mask"] * first["inputs"]["tool_mask"]).sum()
    assert history(trainer, "divergence/max")[0] <= 1e-5
    for record in trainer.recorded:  # tokens that the tool wrote carry no loss
        assert record["loss"].item() == pytest.approx(loss_from_full_logits(trainer, record), rel=1e-6, abs=1e-6)
    if kind == "topk_tv":
        check_recorded_columns(trainer, first, 3)


def test_store_keeps_alignment_through_list_surgery() -> None:
    store = RolloutStore(1)
    first = store.add(
        torch.tensor([[10, -1], [11, 7]]),
        torch.tensor([[-0.1, 0.0], [-0.2, -3.0]]),
        torch.tensor([[True, False], [True, True]]),
    )
    second = store.add(torch.tensor([[20, -1]]), torch.tensor([[-0.5, 0.0]]), torch.tensor([[True, False]]))
    turn_one = [CapturedLogprob(-0.1, first), CapturedLogprob(-3.0, first + 1)]
    spliced = [[*turn_one, 0.0, 0.0, CapturedLogprob(-0.5, second)], turn_one[:1]]
    ids, logprobs, valid = store.columns(spliced, 6, torch.device("cpu"))
    assert ids[0].tolist() == [[10, -1], [11, 7], [-1, -1], [-1, -1], [20, -1], [-1, -1]]
    assert ids[1, 0].tolist() == [10, -1]
    assert not valid[1, 1:].any()
    assert valid[0].any(1).tolist() == [True, True, False, False, True, False]
    assert logprobs[0, 1].tolist() == pytest.approx([-0.2, -3.0])
    assert not logprobs[~valid].any()


def custom_rollout(with_topk: bool, logprobs: bool = True):
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
        completion_ids, captured = trainer._generate_single_turn(prompt_ids, None, {}, trainer.num_generations)
        output = {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": [[float(x) for x in row] for row in captured] if logprobs else None,
        }
        if with_topk:
            rows = [[x.row for x in row] for row in captured]
            ids, values, valid = (torch.cat(parts) for parts in zip(*trainer._rollout_store._parts, strict=True))
            output["topk_token_ids"] = [[ids[r][valid[r]].tolist() for r in row] for row in rows]
            output["topk_logprobs"] = [[values[r][valid[r]].tolist() for r in row] for row in rows]
        return output

    return rollout


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_custom_rollouts(make_trainer, model) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    losses = {}
    for rollout in (None, custom_rollout(with_topk=True)):
        model.load_state_dict(start)
        trainer = make_trainer(
            Recording, divergence_type="topk_tv", divergence_topk=3, rollout_func=rollout, learning_rate=2e-2
        )
        trainer.train()
        losses[rollout is None] = [record["loss"].item() for record in trainer.recorded]
        for record in trainer.recorded:
            assert record["loss"].item() == pytest.approx(loss_from_full_logits(trainer, record), rel=1e-6, abs=1e-6)
    assert losses[True] == pytest.approx(losses[False], abs=1e-6)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_custom_rollouts_without_what_the_loss_needs_are_refused(make_trainer) -> None:
    trainer = make_trainer(divergence_type="topk_tv", divergence_topk=3, rollout_func=custom_rollout(with_topk=False))
    with pytest.raises(ValueError, match="need `topk_token_ids` and `topk_logprobs` from `rollout_func`"):
        trainer.train()
    trainer = make_trainer(rollout_func=custom_rollout(with_topk=False, logprobs=False))
    with pytest.raises(ValueError, match="`rollout_func` returned no log-probs"):
        trainer.train()
    binary = make_trainer(rollout_func=custom_rollout(with_topk=False))
    binary.train()
    assert history(binary, "engine_mismatch/prob_gap_max")[0] <= 1e-5


def test_custom_columns_are_deduplicated_injected_and_checked() -> None:
    store = RolloutStore(2)
    extra = {"topk_token_ids": [[[5, 6, 5], [7, 8]]], "topk_logprobs": [[[-1.0, -2.0, -1.0], [-0.5, -1.5]]], "score": [1]}
    captured = store_custom_rollout(store, [[5, 9]], [[-1.0, -4.0]], None, extra, vocab=10)
    assert extra == {"score": [1]}
    ids, logprobs, valid = store.columns(captured, 2, torch.device("cpu"))
    assert ids[0].tolist() == [[5, 6, -1], [7, 8, 9]]
    assert logprobs[0, 1].tolist() == [-0.5, -1.5, -4.0]
    assert valid[0].tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (
            [[5]],
            [[-1.0]],
            "completion 0 of `rollout_func` has 2 tokens, 1 rows of `topk_token_ids` and 1 rows of `topk_logprobs`",
        ),
        ([[5], [1, 2, 3, 4]], [[-1.0], [-1.0] * 4], "token 1: `topk_token_ids` holds more than K = 2 ids"),
        ([[5], [10]], [[-1.0], [-1.0]], r"token 1: ids must be in \[0, 10\), .* got \[10, 9\]"),
        ([[-2], [9]], [[-1.0], [-1.0]], r"token 0: ids must be in \[0, 10\), .* got \[-2, 5\]"),
        ([[5], [9]], [[-1.0], [float("nan")]], "completion 0 of `rollout_func`, token 1 holds log-prob nan"),
        ([[5, 4], [9]], [[-1.0, None], [-1.0]], "token 0 holds log-prob None"),
        ([[5], [9]], [[1.0], [-1.0]], "token 0 holds log-prob 1.0; log-probs are numbers of at most 0"),
    ],
)
def test_custom_columns_that_do_not_fit_are_refused(ids: list, values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store_custom_rollout(
            RolloutStore(2), [[5, 9]], [[-1.0, -4.0]], None, {"topk_token_ids": [ids], "topk_logprobs": [values]}, vocab=10
        )


def test_custom_columns_of_tokens_the_policy_did_not_write_are_empty() -> None:
    store = RolloutStore(1)
    extra = {"topk_token_ids": [[[5], []]], "topk_logprobs": [[[-1.0], []]]}
    captured = store_custom_rollout(store, [[5, 9]], [[-1.0, None]], [[1, 0]], extra, vocab=10)
    assert captured == [[-1.0, 0.0]]
    ids, _, valid = store.columns(captured, 2, torch.device("cpu"))
    assert ids[0].tolist() == [[5, -1], [-1, -1]]
    assert valid[0].tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "returned no log-probs"),
        ([[-1.0]], "2 tokens and 1 log-probs for completion 0"),
        ([[-1.0, None]], "log-prob None for token 1 of completion 0"),
        ([[-1.0, float("nan")]], "log-prob nan for token 1"),
        ([[-1.0, float("-inf")]], "log-prob -inf for token 1"),
        ([[-1.0, 0.7]], "log-prob 0.7 for token 1 of completion 0; it must be finite and at most 0"),
    ],
)
def test_custom_logprobs_must_be_finite(logprobs: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_custom_logprobs([[5, 9]], logprobs, None)
    check_custom_logprobs([[5, 9]], [[-1.0, None]], [[1, 0]])  # the environment wrote the second


def test_neutral_generation_settings_pass() -> None:
    check_sampling(GenerationConfig(do_sample=True, temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=9).to_dict(), 0.7)
    with pytest.raises(ValueError, match="`top_k`=50 reshapes"):
        check_sampling({"top_k": 50}, 1.0)
