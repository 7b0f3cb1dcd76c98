"""Rollouts by vLLM, its engine faked: the loss against full logits, every trap, and weights that are never stale."""

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from dppo_kernels import DIVERGENCES
from dppo_kernels.trainers import _trl_seam
from dppo_kernels.trainers.rollout_columns import RolloutStore, ranked_columns
from dppo_kernels.trainers.rollout_vllm import (
    capturing,
    check_server,
    prepare_engine,
    store_engine_rollout,
    warn_of_merging,
)
from tests.trainers.conftest import history, weights
from tests.trainers.fake_vllm import FakeEngine, impossible, install, server_info
from tests.trainers.test_dppo_trainer import Recording, loss_from_full_logits
from tests.trainers.test_rollout import check_recorded_columns


@pytest.fixture
def engine(monkeypatch, model) -> FakeEngine:
    return install(monkeypatch, FakeEngine(model))


def check_losses(trainer: Recording, count: int) -> None:
    assert len(trainer.recorded) == count
    for record in trainer.recorded:
        assert record["loss"].item() == pytest.approx(loss_from_full_logits(trainer, record), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_equals_one_from_full_logits(make_trainer, engine, kind: str, mode: str) -> None:
    trainer = make_trainer(
        Recording, use_vllm=True, vllm_mode=mode, divergence_type=kind, divergence_topk=4, temperature=0.8, learning_rate=3e-2,
        gradient_accumulation_steps=2, steps_per_generation=4, max_steps=6, max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    check_losses(trainer, 12)
    assert max(history(trainer, "engine_mismatch/prob_gap_max")) <= 1e-5
    assert max(history(trainer, "engine_mismatch/tv")) <= 1e-5
    assert max(map(abs, history(trainer, "engine_mismatch/kl"))) <= 1e-5
    assert max(history(trainer, "masked/all")) > 0
    assert engine.syncs == 2  # one per rollout
    assert {request["logprobs"] for request in engine.requests} == {4 if kind.startswith("topk") else 0}
    assert "generate" not in vars(trainer.vllm_generation)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("k", [1, 3, 30])
def test_recorded_columns_equal_recomputed_ones(make_trainer, engine, model, k: int, mode: str) -> None:
    model.generation_config.eos_token_id = engine.model.generation_config.eos_token_id = [1, 2, *range(20, 30)]
    trainer = make_trainer(
        Recording, use_vllm=True, vllm_mode=mode, divergence_type="topk_tv", divergence_topk=k, temperature=0.7,
        per_device_train_batch_size=16, max_steps=1,
    )  # fmt: skip
    trainer.train()
    inputs = trainer.recorded[0]["inputs"]
    check_recorded_columns(trainer, trainer.recorded[0], k)
    assert len(set(inputs["completion_mask"].sum(1).tolist())) > 1
    injected = inputs["rollout_topk_valid"][..., k][inputs["completion_mask"].bool()]
    if k < 30:
        assert 0 < injected.sum() < injected.numel()  # sampled tokens outside and inside the top K
    ordered = inputs["rollout_topk_logprobs"][..., :k]
    assert (ordered[..., 1:] <= ordered[..., :-1]).all()
    if mode == "colocate":
        assert engine.max_logprobs == max(20, k)  # TRL leaves it at vLLM's 20


@pytest.mark.parametrize("kind", ["topk_kl", "binary_tv"])
def test_tool_turns_stay_aligned(make_trainer, tool_chats, engine, kind: str) -> None:
    chats, add = tool_chats
    trainer = make_trainer(
        Recording, train_dataset=chats, tools=[add], use_vllm=True, vllm_mode="colocate", divergence_type=kind,
        divergence_topk=3, max_steps=2, max_completion_length=24, steps_per_generation=1, num_iterations=2,
        generation_kwargs={"max_tokens": 5}, learning_rate=3e-2,
    )  # fmt: skip
    trainer.train()
    first = trainer.recorded[0]
    tool_mask = first["inputs"]["tool_mask"].bool() | ~first["inputs"]["completion_mask"].bool()
    assert (~tool_mask).any(1).sum() == 2  # two rows hold tool tokens
    assert history(trainer, "engine_mismatch/prob_gap_max")[0] <= 1e-5
    check_losses(trainer, 2)
    if kind == "topk_kl":
        check_recorded_columns(trainer, first, 3)


def test_lora_is_merged_into_the_engine(make_trainer, engine) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        Recording, use_vllm=True, vllm_mode="colocate", divergence_type="topk_tv", divergence_topk=3, peft_config=lora,
        learning_rate=5e-2, num_iterations=1, steps_per_generation=1, max_steps=3,
    )  # fmt: skip
    trainer.train()
    assert engine.syncs == 3
    assert max(history(trainer, "engine_mismatch/prob_gap_max")) <= 1e-5
    check_losses(trainer, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_into_16_bit_weights_is_warned_of(model, dtype: torch.dtype, caplog) -> None:
    PartialState(cpu=True)  # what the logger asks which process it is on
    warn_of_merging(model.to(dtype))
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert not caplog.records
    warn_of_merging(lora)
    assert ["an adapter on bfloat16 weights" in record.getMessage() for record in caplog.records] == [True] * (
        dtype != torch.float32
    )


def test_impossible_tokens_beside_the_sampled_one(make_trainer, engine) -> None:
    engine.mangle = impossible
    trainer = make_trainer(use_vllm=True, vllm_mode="colocate", divergence_type="topk_kl", divergence_topk=5)
    trainer.train()
    assert all(math.isfinite(x) for key in ("loss", "divergence/max") for x in history(trainer, key))


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_custom_rollouts_may_use_the_engine(make_trainer, engine) -> None:
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
        _, completion_ids, logprobs, ids = trainer.vllm_generation.generate(prompt_ids, None, trainer.num_generations)
        sampled = [[dict(zip(i, v, strict=True))[token] for token, i, v in zip(*row, strict=True)]
                   for row in zip(completion_ids, ids, logprobs, strict=True)]  # fmt: skip
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": sampled, "topk_token_ids": ids,
                "topk_logprobs": logprobs}  # fmt: skip

    trainer = make_trainer(
        Recording, use_vllm=True, vllm_mode="colocate", divergence_type="topk_tv", divergence_topk=3, rollout_func=rollout
    )
    trainer.train()
    check_losses(trainer, 4)


@pytest.mark.parametrize(
    ("mangle", "message"),
    [
        (lambda entries, sampled: {**entries, sampled: (float("nan"), entries[sampled][1])}, "holds log-prob None"),
        (lambda entries, sampled: {**entries, sampled: (-math.inf, 99)}, "the sampled id .* has log-prob -"),
        (lambda entries, sampled: {**entries, 5000: (-1.0, 2)}, r"ids must be in \[0, 108\)"),
        (
            lambda entries, sampled: {i: x for i, x in entries.items() if i != sampled} or {sampled + 1: (-1.0, 1)},
            "is not among the returned ids",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["binary_tv", "topk_tv"])
def test_entries_that_say_nothing_about_the_sample_stop_the_run(make_trainer, engine, mangle, message: str, kind: str) -> None:
    engine.mangle = mangle
    trainer = make_trainer(use_vllm=True, vllm_mode="colocate", divergence_type=kind, divergence_topk=3)
    with pytest.raises(ValueError, match=f"completion 0 of vLLM, token 0.*{message}"):
        trainer.train()
    assert "generate" not in vars(trainer.vllm_generation)


def test_the_server_writes_minus_9999_for_impossible(make_trainer, engine) -> None:
    engine.mangle = lambda entries, sampled: {**entries, sampled: (-math.inf, 99)}
    trainer = make_trainer(use_vllm=True, vllm_mode="server", divergence_type="topk_tv", divergence_topk=3)
    with pytest.raises(ValueError, match=r"the sampled id .* has log-prob -9999\.0, so its probability is unknown"):
        trainer.train()


def test_columns_are_looked_up_ranked_and_deduplicated() -> None:
    store = RolloutStore(2)
    ids = [[[5, 6], [7, 8, 9]], [[3, 4, 3], [1, 2, 0], [6]]]
    values = [[[-0.5, -1.5], [-0.5, -1.5, -4.0]], [[-1.0, -0.7, -1.0], [-1.0, -1.0, -1.0], [-0.1]]]
    captured = store_engine_rollout(store, [[6, 9], [3, 2, 6]], ids, values, 10)
    assert captured == [[-1.5, -4.0], [-1.0, -1.0, -0.1]]
    ids_, logprobs, valid = store.columns(captured, 3, torch.device("cpu"))
    assert ids_[0].tolist() == [[5, 6, -1], [7, 8, 9], [-1, -1, -1]]
    assert ids_[1].tolist() == [[4, 3, -1], [0, 1, 2], [6, -1, -1]]  # equal values: lower ids are the top K
    assert logprobs[0, 1].tolist() == [-0.5, -1.5, -4.0]
    assert valid[1].tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert not logprobs[~valid].any()


def test_an_impossible_entry_is_still_an_entry() -> None:
    sampled, (ids, values, valid) = ranked_columns([3], [[3, 3, 6]], [[-0.1, -0.1, -math.inf]], k=3, vocab=9, place="here")
    assert sampled == [-0.1]
    assert (ids.tolist(), valid.tolist()) == ([[3, 6, -1, -1]], [[True, True, False, False]])
    assert values.tolist() == [[pytest.approx(-0.1), -math.inf, 0.0, 0.0]]


def test_an_entry_tied_with_the_sampled_one_does_not_take_its_column() -> None:
    _, (ids, _, valid) = ranked_columns([0], [[4, 0]], [[-1.0, -1.0]], k=1, vocab=9, place="here")
    assert (ids.tolist(), valid.tolist()) == ([[0, -1]], [[True, False]])


def test_columns_equal_those_of_the_logits() -> None:
    from dppo_kernels import topk_logprobs

    logits, k = torch.randn(64, 40).mul(3), 6
    logits[::3, 20:] = -math.inf
    sampled = torch.distributions.Categorical(logits=logits).sample()
    expected = topk_logprobs(logits, sampled, k)
    logprobs = logits.log_softmax(-1)
    rows = []
    for t in range(64):
        row = [int(sampled[t]), *logprobs[t].topk(k).indices.tolist()]
        rows.append([row[i] for i in torch.randperm(k + 1)])  # any order, the sampled id perhaps twice
    values = [logprobs[t][row].tolist() for t, row in enumerate(rows)]
    sampled_logprobs, columns = ranked_columns(sampled.tolist(), rows, values, k=k, vocab=40, place="here")
    torch.testing.assert_close(torch.tensor(sampled_logprobs), expected.sampled_logprobs)
    for got, name in zip(columns, ("ids", "logprobs", "valid"), strict=True):
        torch.testing.assert_close(got, getattr(expected, name))


def test_no_tokens_no_columns() -> None:
    sampled, columns = ranked_columns([], [], [], k=2, vocab=9, place="here")
    assert sampled == []
    assert [x.shape for x in columns] == [(0, 3)] * 3


@pytest.mark.parametrize(
    ("tokens", "ids", "values", "message"),
    [
        ([5, 6], [[5]], [[-1.0]], "has 2 tokens, 1 rows of top-K ids and 1 rows of top-K log-probs"),
        ([5], [[5, 6]], [[-1.0]], "token 0: 2 top-K ids and 1 top-K log-probs"),
        ([5, 6], [[5], [6]], [[-1.0], [0.5]], "token 1 holds log-prob 0.5; log-probs are numbers of at most 0"),
    ],
)
def test_entries_that_do_not_fit_are_refused(tokens: list, ids: list, values: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"completion 0 of vLLM.*{message}"):
        store_engine_rollout(RolloutStore(1), [tokens], [ids], [values], 9)


def test_what_the_engine_must_return() -> None:
    def answer(*reply: Any) -> Any:
        return capturing(lambda prompts, **kwargs: reply, RolloutStore(1), 9)

    with pytest.raises(ValueError, match="vLLM returned no log-probs"):
        answer([[1]], [[5]], None, None)(prompts=[[1]])
    with pytest.raises(ValueError, match="completed other prompts than those it was given"):
        answer([[2]], [[5]], [[[-1.0]]], [[[5]]])(prompts=[[1]])
    with pytest.raises(ValueError, match="returned 1 completions, 2 lists of ids, 1 of log-probs"):
        answer([[1]], [[5]], [[[-1.0]]], [[[5]], []])(prompts=[[1]])
    with pytest.raises(ValueError, match="has a token without log-probs"):
        answer([[1]], [[5]], [[[]]], [[[]]])(prompts=[[1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_kwargs": {"logprobs": 20}}, "must not hold `logprobs`"),
        ({"generation_kwargs": '{"logprobs": 5}'}, "must not hold `logprobs`"),
        ({"generation_kwargs": {"prompt_logprobs": 1}}, "must not hold `prompt_logprobs`"),
        ({"generation_kwargs": {"n": 2}}, "must not hold `n`"),
        ({"generation_kwargs": {"flat_logprobs": True}}, "must not hold `flat_logprobs`"),
        ({"generation_kwargs": {"logprob_token_ids": [3]}}, "must not hold `logprob_token_ids`"),
        ({"generation_kwargs": {"seed": 1}}, "must not hold `seed` .* the same completion for all copies"),
        ({"top_p": None}, "`top_p`=None reshapes"),
        ({"top_k": None}, "`top_k`=None reshapes"),
        ({"repetition_penalty": None}, "`repetition_penalty`=None reshapes"),
        ({"generation_kwargs": {"temperature": None}}, "in whose place a server takes the model's default"),
        ({"generation_kwargs": {"presence_penalty": None}}, "`presence_penalty`=None reshapes"),
        ({"generation_kwargs": {"temperature": 0.3}}, "generation runs at temperature 0.3, training at 1.0"),
        ({"generation_kwargs": {"truncate_prompt_tokens": 4}}, "`truncate_prompt_tokens`=4, which is not known to leave"),
        ({"temperature": 0.005}, "`temperature` must be at least 0.01 with vLLM, got 0.005"),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, r"`vllm_structured_outputs_regex`='\[0-9\]\+' reshapes"),
        ({"top_p": 0.9}, "`top_p`=0.9 reshapes"),
        ({"top_k": 50}, "`top_k`=50 reshapes"),
        ({"min_p": 0.1}, "`min_p`=0.1 reshapes"),
        ({"repetition_penalty": 1.2}, "`repetition_penalty`=1.2 reshapes"),
        ({"vllm_importance_sampling_correction": True}, "would correct twice"),
        *(
            ({"generation_kwargs": {name: value}}, f"`{name}`=.* reshapes")
            for name, value in {
                "top_p": 0.9,
                "top_k": 5,
                "min_p": 0.1,
                "min_tokens": 3,
                "repetition_penalty": 1.1,
                "presence_penalty": 0.5,
                "frequency_penalty": -0.5,
                "logit_bias": {3: 1.0},
                "allowed_token_ids": [3],
                "bad_words": ["x"],
                "structured_outputs": {"regex": "x"},
                "logits_processors": [print],
                "extra_args": {"x": 1},
                "thinking_token_budget": 5,
                "watermarking": True,
            }.items()
        ),
    ],
)
def test_settings_that_bias_every_ratio_are_refused(make_config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(use_vllm=True, vllm_mode="colocate", **changes)


def test_neutral_settings_of_vllm_pass(make_config) -> None:
    harmless = {
        "max_tokens": 5,
        "stop": ["x"],
        "ignore_eos": True,
        "temperature": 0.7,
        "bad_words": [],
        "top_p": 1.0,
    }
    make_config(use_vllm=True, top_k=-1, temperature=0.7, generation_kwargs=harmless)
    with pytest.raises(ValueError, match="`top_k`=-1 reshapes"):  # to transformers it is no neutral value
        make_config(top_k=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "restart it with `--logprobs-mode processed_logprobs`"),
        ({"logprobs_mode": "processed_logits"}, "`--logprobs-mode processed_logits`"),
        ({"max_logprobs": 29}, "at most 29 log-probs per token, `divergence_topk` is 30: restart it with `--max-logprobs 30`"),
        ({"logits_processors": ["mine:Processor"]}, "`--logits-processors` .* reshapes"),
    ],
)
def test_servers_that_cannot_serve_are_refused(make_trainer, monkeypatch, model, changes: dict[str, Any], message: str) -> None:
    install(monkeypatch, FakeEngine(model), server_info(**{"max_logprobs": 30, **changes}))
    with pytest.raises(ValueError, match=message):
        make_trainer(use_vllm=True, vllm_mode="server", divergence_type="topk_tv", divergence_topk=30)
    for fits in (30, 31, -1):
        check_server(server_info(max_logprobs=fits), 30)
    with pytest.raises(ValueError, match=r"`--watermark` .* reshapes"):
        check_server({**server_info(), "watermark_config": {"algorithm": "x"}}, 1)


@pytest.mark.parametrize(
    ("mode", "processes", "tensor_parallel", "refused"),
    [("server", 2, 1, True), ("server", 1, 1, False), ("colocate", 2, 1, False), ("colocate", 2, 2, True)],
)
def test_tools_need_an_engine_per_process(
    make_trainer, engine, mode: str, processes: int, tensor_parallel: int, refused: bool
) -> None:
    trainer = make_trainer(use_vllm=True, vllm_mode=mode)
    prepare_engine(trainer, 3)
    one = trainer.accelerator
    trainer.accelerator = SimpleNamespace(num_processes=processes, process_index=0, is_main_process=True)
    trainer.vllm_generation.tensor_parallel_size, trainer.tools = tensor_parallel, [print]
    with pytest.raises(ValueError, match="engine that 2 processes share") if refused else contextlib.nullcontext():
        prepare_engine(trainer, 3)
    trainer.accelerator = one


def test_weights_are_never_stale(make_trainer, engine, model, prompts) -> None:
    """TRL pushes them when the global step changed, which misses a second run and weights loaded in between."""
    trainer = make_trainer(
        use_vllm=True, vllm_mode="colocate", max_steps=2, num_iterations=4, score_inactive=True,
        eval_dataset=prompts.select(range(4)), per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()  # one rollout, at step 0
    trainer.train()
    assert max(history(trainer, "engine_mismatch/prob_gap_max")) <= 1e-5
    for p in model.parameters():
        p.data.mul_(1.5)
    trainer.evaluate()
    assert history(trainer, "eval_engine_mismatch/prob_gap_max")[-1] <= 1e-5
    for p in model.parameters():
        p.data.mul_(0.8)
    trainer.evaluate()
    assert history(trainer, "eval_engine_mismatch/prob_gap_max")[-1] <= 1e-5


@pytest.mark.parametrize("save_at", [2, 3])  # at the end of a rollout's window, inside one
@pytest.mark.parametrize("kind", ["binary_kl", "topk_kl"])
def test_resume_is_exact(make_trainer, monkeypatch, model, tmp_path, kind: str, save_at: int) -> None:
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "divergence_type": kind,
        "divergence_topk": 3,
        "max_steps": 6,
        "steps_per_generation": 2,
        "num_iterations": 1,
        "learning_rate": 5e-3,
        "save_strategy": "steps",
        "save_steps": save_at,
        "score_inactive": True,
    }

    def run(out: str, resume: str | None) -> Any:
        model.load_state_dict(start)
        install(monkeypatch, FakeEngine(model))  # with weights of its own: the first rollout must sync
        trainer = make_trainer(output_dir=str(tmp_path / out), **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", None)
    expected = weights(whole)
    resumed = run("resumed", str(tmp_path / "whole" / f"checkpoint-{save_at}"))
    assert all(torch.equal(p, expected[name]) for name, p in weights(resumed).items())
    for key in ("loss", "divergence/max", "engine_mismatch/prob_gap_max", "engine_mismatch/kl"):
        assert history(resumed, key) == history(whole, key)
    assert max(history(resumed, "engine_mismatch/prob_gap_max")) <= 1e-5


def test_the_seed_reaches_the_engine(make_trainer, engine, model) -> None:
    """Building vLLM's engine seeds the process anew, with the rank."""
    start = {name: p.clone() for name, p in model.state_dict().items()}
    drawn, one_prompt = [], Dataset.from_dict({"prompt": ["1+1="] * 8})
    for seed in (3, 3, 4):
        model.load_state_dict(start)
        trainer = make_trainer(Recording, use_vllm=True, vllm_mode="colocate", max_steps=1, seed=seed, train_dataset=one_prompt)
        trainer.train()
        drawn.append(trainer.recorded[0]["inputs"]["completion_ids"].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_seam_names_what_is_missing(make_trainer, engine, monkeypatch) -> None:
    trainer = make_trainer(use_vllm=True, vllm_mode="colocate")
    _trl_seam.check_attributes(trainer)
    generation = trainer.vllm_generation
    _trl_seam.check_vllm_attributes(generation)
    llm = generation.llm
    del generation.llm
    with pytest.raises(ImportError, match="sets no llm"):
        _trl_seam.check_vllm_attributes(generation)
    generation.llm = llm
    monkeypatch.setattr(_trl_seam.VLLMGeneration, "generate", lambda self, prompts: None)
    with pytest.raises(ImportError, match=r"generates from \(self, prompts\); expected \(self, prompts, images"):
        _trl_seam.check_vllm_attributes(generation)
    del trainer.vllm_generation
    with pytest.raises(ImportError, match="sets no vllm_generation"):
        _trl_seam.check_attributes(trainer)
