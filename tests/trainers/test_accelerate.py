"""TRL's own trainers train the same with and without `accelerate_trl`, and with it none of TRL's scoring runs."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3ForCausalLM
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils

import dppo_kernels.trainers
from dppo_kernels.trainers import _trl_seam, accelerate_trl, scoring
from dppo_kernels.trainers.accelerate import LinearLogprobFunction
from dppo_kernels.trainers.accelerate_grpo import fused_loss_obstacle
from tests.trainers.conftest import reward_length, small_config, weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

SUMS = [(a, b) for a in range(3, 60, 5) for b in (1, 20)]
TEXTS = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in SUMS], "completion": [str(a + b) for a, b in SUMS]})
PAIRS = TEXTS.rename_column("completion", "chosen").add_column("rejected", [str(a - b) for a, b in SUMS])
LABELLED = TEXTS.add_column("label", [a % 2 == 0 for a, _ in SUMS])

ONLINE = {"num_generations": 4, "max_completion_length": 6, "num_iterations": 2, "beta": 0.1, "temperature": 0.8}
# TRL's name of the trainer, its data, what is configured.
CASES: dict[str, tuple[str, Dataset, dict[str, Any]]] = {
    "grpo": ("GRPO", TEXTS, ONLINE),
    "grpo accumulation": ("GRPO", TEXTS, {**ONLINE, "gradient_accumulation_steps": 2, "cast_lm_head_to_fp32": True}),
    "grpo lora": ("GRPO", TEXTS, {**ONLINE, "learning_rate": 0.1, "peft_config": LoraConfig(r=4, target_modules="all-linear")}),
    **{
        f"grpo {kind}": ("GRPO", TEXTS, {**ONLINE, "loss_type": kind, "learning_rate": 2e-2, **changes})
        for kind, changes in {
            "grpo": {"delta": 1.3, "gradient_accumulation_steps": 2},
            "bnpo": {"entropy_coef": 0.05, "gradient_accumulation_steps": 2},
            "dr_grpo": {"use_bias_correction_kl": True, "gradient_accumulation_steps": 2},
            "cispo": {"epsilon_high": 1.05},
            "sapo": {},
            "luspo": {},
        }.items()
    },
    "grpo sequence": ("GRPO", TEXTS, {**ONLINE, "importance_sampling_level": "sequence", "epsilon": 3e-4, "beta": 0.0}),
    "grpo high entropy": ("GRPO", TEXTS, {**ONLINE, "top_entropy_quantile": 0.5}),
    "rloo": ("RLOO", TEXTS, ONLINE),
    "sft": ("SFT", TEXTS, {}),
    "dpo": ("DPO", PAIRS, {"learning_rate": 0.1, "use_weighting": True}),
    "kto": ("KTO", LABELLED, {"learning_rate": 0.1}),
}


# Not through the fused loss, and why.
UNFUSED = {"grpo luspo": "loss_type 'luspo' is not fused", "grpo high entropy": "top_entropy_quantile needs all entropies"}


class Calls:
    """The rows that each implementation was handed, call by call."""

    def __init__(self) -> None:
        self.ours: list[int] = []
        self.trls: list[int] = []
        self.fused: list[int] = []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()

    def count(function: type[torch.autograd.Function], into: list[int]) -> None:
        forward = function.forward

        @functools.wraps(forward)
        def counting(ctx: Any, hidden: torch.Tensor, *rest: Any) -> Any:
            into.append(hidden.shape[0])
            return forward(ctx, hidden, *rest)

        monkeypatch.setattr(function, "forward", staticmethod(counting))

    fused = scoring.linear_policy_loss

    def counting_fused(hidden: torch.Tensor, *rest: Any, loss_mask: torch.Tensor, **options: Any) -> Any:
        counted.fused.append(int(loss_mask.sum()))
        return fused(hidden, *rest, loss_mask=loss_mask, **options)

    monkeypatch.setattr(scoring, "linear_policy_loss", counting_fused)
    count(LinearLogprobFunction, counted.ours)
    count(ChunkedLogProbFunction, counted.trls)
    return counted


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory) -> str:
    """On disk: trainers load their reference model again from where the model came from."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(small_config(len(tokenizer)))
    model.lm_head.weight.data *= 12  # confident tokens, so that entropies and ratios differ
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def build(checkpoint: str, tokenizer, tmp_path: Path) -> Callable[[str], Any]:
    def build(case: str) -> Any:
        kind, dataset, changes = CASES[case]
        settings = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "optim": "sgd",  # Adam would amplify the rounding of gradients that are almost zero
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
            **changes,
        }
        more = {"peft_config": settings.pop("peft_config", None)}
        if kind in ("GRPO", "RLOO"):
            more["reward_funcs"] = reward_length
        args = getattr(trl, f"{kind}Config")(**settings)
        return getattr(trl, f"{kind}Trainer")(checkpoint, args=args, train_dataset=dataset, processing_class=tokenizer, **more)

    return build


def metrics(trainer: Any) -> list[dict[str, float]]:
    """What was logged, step by step, without times."""
    return [
        {name: value for name, value in entry.items() if "time" not in name and "per_second" not in name}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("case", CASES)
def test_trls_trainers_train_the_same(case: str, build, calls: Calls) -> None:
    plain = build(case)
    start = weights(plain)
    plain.train()
    assert calls.trls
    assert not calls.ours
    rows_by_trl = calls.trls.copy()

    accelerated = build(case)  # it exists before TRL is patched
    with accelerate_trl():
        accelerated.train()
    assert calls.trls == rows_by_trl
    assert len(calls.ours) + len(calls.fused) == len(rows_by_trl)
    assert sum(calls.ours) + sum(calls.fused) < sum(rows_by_trl)  # on CPU, TRL scores prompts and padding too
    micro_batches = 3 * accelerated.args.gradient_accumulation_steps
    assert len(calls.fused) == (micro_batches if case.startswith("grpo") and case not in UNFUSED else 0)
    if case.startswith("grpo"):
        obstacle = fused_loss_obstacle(accelerated)
        assert (obstacle is None) == (case not in UNFUSED)
        assert (obstacle or "").startswith(UNFUSED.get(case, ""))

    assert [entry["step"] for entry in metrics(plain) if "loss" in entry] == [1, 2, 3]
    for ours, trls in zip(metrics(accelerated), metrics(plain), strict=True):
        assert ours == pytest.approx(trls, rel=1e-4, abs=1e-5)
    largest = 0.0
    after = weights(accelerated)
    for name, expected in weights(plain).items():
        step = (expected - start[name]).abs().max().item()
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-3 * step + 1e-7, msg=name)
        largest = max(largest, step)
    assert largest > 5e-4


def test_each_trainer_scores_at_its_own_temperature(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainers on one model: neither leaves a forward behind, nor takes the other's settings."""
    seen = []
    real = scoring.linear_policy_loss
    monkeypatch.setattr(
        scoring,
        "linear_policy_loss",
        lambda *a, temperature, **k: seen.append(temperature) or real(*a, temperature=temperature, **k),
    )
    first = build("grpo")
    forward = first.model.forward
    with accelerate_trl():
        first.train()
        assert first.model.forward == forward
        second = type(first)(
            first.model,
            reward_length,
            dataclasses.replace(first.args, temperature=0.5, max_steps=2, generation_batch_size=None),
            train_dataset=TEXTS,
            processing_class=first.processing_class,
        )
        second.train()
    assert seen == [0.8] * 3 + [0.5] * 2


def test_a_trainer_that_scores_in_its_own_way_is_left_alone(build) -> None:
    trainer = build("grpo")
    trainer.__class__ = type("Own", (type(trainer),), {"_get_per_token_logps_and_entropies": lambda self, *a, **k: None})
    assert fused_loss_obstacle(trainer) == "Own overrides _get_per_token_logps_and_entropies"


@pytest.mark.parametrize("kind", ["grpo grpo", "grpo dr_grpo", "grpo cispo", "grpo"])
def test_evaluation_is_the_same(kind: str, build, calls: Calls) -> None:
    trainer = build(kind)
    evaluated = []
    for patch in (contextlib.nullcontext(), accelerate_trl()):
        torch.manual_seed(0)
        with patch:
            found = trainer.evaluate(TEXTS.select(range(8)))
        evaluated.append({k: v for k, v in found.items() if "time" not in k and "per_second" not in k})
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4, abs=1e-5)
    assert evaluated[0]["eval_entropy"] > 0
    assert calls.fused


@pytest.fixture
def scored_model(tokenizer) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(small_config(len(tokenizer))).to(DEVICE)
    trl_utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *OUTPUTS))
    return model


@pytest.mark.parametrize("kept", ["some", "none"])
def test_only_labelled_positions_are_scored(kept: str, scored_model: Qwen3ForCausalLM, calls: Calls) -> None:
    ids = torch.randint(8, 100, (3, 12), device=DEVICE)
    labels = ids.clone()
    labels[0, :5] = labels[1] = -100
    if kept == "none":
        labels[:] = -100

    def score() -> tuple[Any, dict[str, torch.Tensor]]:
        scored_model.zero_grad()
        out = scored_model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss + 0.1 * out.entropy.sum()).backward()
        return out, {name: p.grad.clone() for name, p in scored_model.named_parameters()}

    expected, expected_gradients = score()
    with accelerate_trl():
        out, gradients = score()
    assert calls.ours == [int((labels[:, 1:] != -100).sum())]
    assert out.keys() == expected.keys()
    for name, value in out.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no rows": {"rows": 0},
    "bias, scale and soft-cap": {"bias": True, "softcap": 2.0, "logit_scale": 1.5, "temperature": 0.6},
    "some outputs": {"outputs": ("log_probs", "log_sum_sq_probs")},
    "float32 rows, bfloat16 head": {"weight_dtype": torch.bfloat16},
    "bfloat16 rows, float32 head": {"hidden_dtype": torch.bfloat16},
    "autocast": {"bias": True, "autocast": True},
    "frozen head": {"bias": True, "frozen": ("weight", "bias")},
    "frozen rows": {"frozen": ("hidden",)},
}


def from_full_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    _: int,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[torch.Tensor | None, ...]:
    """The definition of the five results, with TRL's arguments."""
    z = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = z.log_softmax(-1)
    values = {
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1).detach(),
        "mean_logits": z.mean(-1).detach(),
        "is_top1": z.argmax(-1) == targets,
    }
    return logp.gather(1, targets[:, None]).squeeze(1), *(values[name] if name in outputs else None for name in OUTPUTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_is_trls(variant: str) -> None:
    """Every result and gradient: TRL's dtype, and within twice TRL's own error against float64."""
    given = VARIANTS[variant]
    rows, hidden_size, vocab = given.get("rows", 33), 24, 107
    inputs = {
        "hidden": torch.randn(rows, hidden_size, device=DEVICE).to(given.get("hidden_dtype", torch.float32)),
        "weight": torch.randn(vocab, hidden_size, device=DEVICE).to(given.get("weight_dtype", torch.float32)),
        "bias": torch.randn(vocab, device=DEVICE) if given.get("bias") else None,
    }
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    scalars = (given.get("temperature", 1.0), 64, given.get("softcap"), given.get("logit_scale", 1.0))
    outputs = given.get("outputs", ("log_probs", *OUTPUTS))

    def run(apply: Callable[..., Any], dtype: torch.dtype | None = None) -> list[tuple[str, torch.Tensor]]:
        leaves = {
            name: value.to(dtype or value.dtype, copy=True).requires_grad_(name not in given.get("frozen", ()))
            for name, value in inputs.items()
            if value is not None
        }
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=given.get("autocast", False) and dtype is None):
            results = apply(leaves["hidden"], leaves["weight"], leaves.get("bias"), targets, *scalars, outputs)
        loss = (results[0] * torch.linspace(-1, 1, rows, device=DEVICE)).sum()
        if results[1] is not None:
            loss = loss + 0.3 * results[1].sum()
        loss.backward()
        named = [*zip(("log_probs", *OUTPUTS), results, strict=True), *((name, leaf.grad) for name, leaf in leaves.items())]
        return [(name, value) for name, value in named if value is not None]

    with accelerate_trl():
        ours = run(trl_utils._ChunkedLogProbFunction.apply)
    trls = run(ChunkedLogProbFunction.apply)
    truth = run(from_full_logits, torch.float64)
    for (name, our), (trl_name, their), (true_name, right) in zip(ours, trls, truth, strict=True):
        assert name == trl_name == true_name
        assert our.dtype == their.dtype, name
        assert our.requires_grad == their.requires_grad, name
        if our.dtype == torch.bool:
            assert (our != right).sum() <= (their != right).sum(), name
        elif our.numel():
            error, trls_error = ((value.double() - right).abs().max().item() for value in (our, their))
            assert error <= 2 * trls_error + 1e-6, name


def test_autocast_rounds_what_enters_the_projection() -> None:
    hidden, weight, targets = torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, *_ = LinearLogprobFunction.apply(hidden, weight, None, targets, 1.0, 64)
    rounded = from_full_logits(hidden.bfloat16().float(), weight.bfloat16().float(), None, targets, 1.0, 64, None, 1.0, ())
    torch.testing.assert_close(logprobs, rounded[0], rtol=0, atol=1e-5)


def test_a_head_that_zero3_partitions_is_gathered_in_the_backward(monkeypatch) -> None:
    """DeepSpeed empties a parameter outside of TRL's gathering context; this one does the same to plain tensors."""
    hidden = torch.randn(6, 8, requires_grad=True)
    weight, bias = torch.nn.Parameter(torch.randn(11, 8)), torch.nn.Parameter(torch.randn(11))
    targets = torch.randint(0, 11, (6,))
    whole = {id(weight): weight.data, id(bias): bias.data}
    gathered = []

    @contextlib.contextmanager
    def gather(*parameters: torch.nn.Parameter) -> Iterator[None]:
        gathered.append([id(p) for p in parameters])
        for p in parameters:
            p.data = whole[id(p)]
        yield
        for p in parameters:
            p.data = torch.empty(0)

    def gradients() -> tuple[torch.Tensor, ...]:
        with trl_utils.maybe_gather_lm_head_ctx(weight, bias):
            results = LinearLogprobFunction.apply(hidden, weight, bias, targets, 0.8, 64)
        return torch.autograd.grad(results[0].sum() - results[1].sum(), (hidden, weight, bias))

    expected = gradients()
    monkeypatch.setattr(trl_utils, "maybe_gather_lm_head_ctx", gather)
    for gradient, right in zip(gradients(), expected, strict=True):
        assert torch.equal(gradient, right)
    assert gathered == [[id(weight), id(bias)]] * 2  # forward, backward
    assert weight.numel() == bias.numel() == 0


def test_the_function_compiles_into_one_graph() -> None:
    def score(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logprobs, entropy, *_ = LinearLogprobFunction.apply(hidden, weight, None, targets, 0.8, 64, None, 1.0, ("entropy",))
        return logprobs.sum() + entropy.sum()

    inputs = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(0, 11, (5,))
    loss = torch.compile(score, backend="aot_eager", fullgraph=True)(*inputs, targets)
    assert torch.equal(loss, score(*inputs, targets))
    for compiled, eager in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(score(*inputs, targets), inputs), strict=True
    ):
        assert torch.equal(compiled, eager)


# Everything in the module: also what is replaced and should not be shows.
TRLS_OWN = dict(vars(trl_utils))
BOTH = {"_ChunkedLogProbFunction", "_use_triton"}


def replaced() -> set[str]:
    """The names of TRL's module that hold something else than TRL put there."""
    return {name for name in TRLS_OWN.keys() | vars(trl_utils).keys() if vars(trl_utils).get(name) is not TRLS_OWN.get(name)}


def test_undo_gives_trl_its_own_objects_back() -> None:
    handle = accelerate_trl()
    assert replaced() == BOTH
    handle.undo()
    assert not replaced()
    handle.undo()
    assert not replaced()
    with pytest.raises(RuntimeError, match="was undone: call accelerate_trl"):
        handle.__enter__()


def test_an_exception_in_the_block_undoes_it_and_goes_on() -> None:
    def fail() -> None:
        with accelerate_trl():
            assert replaced() == BOTH
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not replaced()


def test_it_lasts_until_the_last_of_several_is_undone() -> None:
    with accelerate_trl() as outer:
        with accelerate_trl():
            pass
        assert replaced() == BOTH
        later = accelerate_trl()
        outer.undo()
        outer.undo()  # counts once
        assert replaced() == BOTH
        later.undo()
        assert not replaced()
    assert not replaced()


def test_another_trl_is_refused(monkeypatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.17.2" if name == "trl" else version(name))
    monkeypatch.delitem(sys.modules, _trl_seam.__name__)  # it checks when it is imported
    with pytest.raises(ImportError, match=r"tested with trl>=1\.16,<1\.17; found trl 1\.17\.2"):
        _ = dppo_kernels.trainers.accelerate_trl


def test_a_trl_that_scores_otherwise_is_refused(monkeypatch) -> None:
    class Narrower(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return hidden

    with monkeypatch.context() as patch:
        patch.setattr(trl_utils, "_ChunkedLogProbFunction", Narrower)
        with pytest.raises(ImportError, match=r"takes \(ctx, hidden, targets\); expected \(ctx, hidden, weight, bias"):
            accelerate_trl()
        assert replaced() == {"_ChunkedLogProbFunction"}
    with monkeypatch.context() as patch:
        patch.delattr(trl_utils, "_use_triton")
        with pytest.raises(ImportError, match=r"lacks trl\.trainer\.utils\._use_triton"):
            accelerate_trl()
    assert not replaced()


def test_the_reference_backend_is_refused_not_replaced(monkeypatch) -> None:
    monkeypatch.setenv("DPPO_KERNELS_BACKEND", "reference")
    with pytest.raises(ValueError, match="DPPO_KERNELS_BACKEND='reference' has no op"):
        LinearLogprobFunction.apply(torch.randn(2, 4), torch.randn(5, 4), None, torch.tensor([1, 2]), 1.0, 64)
