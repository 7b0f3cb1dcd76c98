"""One run of each trainer under a wrapper: however the prompts are divided over processes, the same completions."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Qwen3ForCausalLM

from dppo_kernels.trainers import (
    DAPOConfig,
    DAPOTrainer,
    DecoupledPPOConfig,
    DecoupledPPOTrainer,
    DistillPPOConfig,
    DistillPPOTrainer,
    DPOConfig,
    DPOTrainer,
    DPPOConfig,
    DPPOTrainer,
    PPOConfig,
    PPOTrainer,
    scoring,
)
from tests.distributed.trainers.engines import build_nothing, keep_fsdp
from tests.trainers import conftest
from tests.trainers.dapo_worker import by_length, given_completions
from tests.trainers.distill_runs import scaled_teacher, teacher_model
from tests.trainers.ppo_runs import value_model

STEPS = 6
ROWS = 8  # completions, or pairs, of an optimiser step over all processes and micro-batches

tokenizer = conftest.tokenizer.__wrapped__()


def engine_settings(wrapper: str | None) -> dict[str, Any]:
    """What a config is given for it."""
    if wrapper == "fsdp2":
        keep_fsdp()
        return {"fsdp": True}
    if wrapper in ("zero2", "zero3"):
        import deepspeed

        build_nothing()
        deepspeed.init_distributed("gloo")
        zero: dict[str, Any] = {"stage": int(wrapper[-1])}
        if wrapper == "zero3":  # small parameters would stay whole
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        return {"deepspeed": {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **dict.fromkeys(names, "auto")}}
    return {}


def policy(tied: bool = False) -> Qwen3ForCausalLM:
    if not tied:
        return conftest.model.__wrapped__(tokenizer)
    torch.manual_seed(0)
    return Qwen3ForCausalLM(conftest.small_config(len(tokenizer), tie_word_embeddings=True))


def with_logprobs(start: Any, k: int) -> Callable[..., dict[str, Any]]:
    """`given_completions` with log-probs of a policy that is near the one training starts from; top-K ids where `k` > 0."""

    @torch.no_grad()
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        given = given_completions(prompts, trainer)
        given["logprobs"], given["topk_token_ids"], given["topk_logprobs"] = [], [], []
        for prompt, completion in zip(given["prompt_ids"], given["completion_ids"], strict=True):
            logits = start(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logp = torch.log_softmax(0.9 * logits, -1)
            top = logp.topk(max(k, 1))
            given["logprobs"].append(logp.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist())
            given["topk_token_ids"].append(top.indices.tolist())
            given["topk_logprobs"].append(top.values.tolist())
        if not k:
            del given["topk_token_ids"], given["topk_logprobs"]
        return given

    return rollout


class GivesLogits(nn.Module):
    """A module that is no transformers model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def get_teacher_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions).logits


def make(
    name: str,
    wrapper: str | None,
    out: str,
    *,
    accumulation: int = 1,
    lora: bool = False,
    tied: bool = False,
    teacher: str = "qwen",
    **changes: Any,
) -> Any:
    """The trainer of this name; all splits of its steps over processes and micro-batches are one step."""
    # Models come before configs, which, of ZeRO-3, change how models are made.
    models = {"policy": policy(tied), "start": policy(tied).eval(), "value": value_model(len(tokenizer))}
    models["teacher"] = (scaled_teacher if teacher == "granite" else teacher_model)(len(tokenizer))
    if teacher == "own logits":
        models["teacher"] = GivesLogits(models["teacher"])
    engine, world = engine_settings(wrapper), 2 if wrapper else 1
    rows = ROWS // (world * accumulation)
    common = {"max_steps": STEPS, "learning_rate": 1e-3, "weight_decay": 0.1, "gradient_accumulation_steps": accumulation}
    common |= {"steps_per_generation": accumulation, "per_device_train_batch_size": rows, "adam_epsilon": 1e-4, **engine}
    alone = {"num_generations": 1, "num_iterations": 1, "steps_per_generation": None, "num_ppo_epochs": 2, "kl_coef": 0.1}
    alone |= {"max_grad_norm": 0.0, "whiten_rewards": True, "entropy_coef": 0.05}
    given = {
        "dppo": (DPPOTrainer, DPPOConfig, {"divergence_type": "topk_kl", "divergence_topk": 3, "num_iterations": 2}),
        "dapo": (DAPOTrainer, DAPOConfig, {"entropy_coef": 0.05, "num_iterations": 2, "beta": 0.05}),
        "ppo": (PPOTrainer, PPOConfig, {**alone, "vf_coef": 0.5}),
        "shared": (PPOTrainer, PPOConfig, {**alone, "share_value_backbone": True}),
        "decoupled": (DecoupledPPOTrainer, DecoupledPPOConfig, {**alone, "vf_learning_rate": 3e-3, "num_vf_epochs": 2}),
        "distill": (DistillPPOTrainer, DistillPPOConfig, {**alone, "kd_kind": "jsd", "kd_temperature": 1.5}),
        "dpo": (DPOTrainer, DPOConfig, {}),
    }
    cls, config, own = given[name]
    if name == "distill":
        renamed = {"num_ppo_epochs": "ppo_epochs", "kl_coef": "init_kl_coef"}
        own = {renamed.get(option, option): value for option, value in own.items()}
        common |= {"batch_size": ROWS // world, "mini_batch_size": rows, "scheduler_name": "constant"}
    if name == "dpo":
        return _make_dpo(models["policy"], models["start"], out, {**common, **changes}, lora)
    args = conftest.make_config.__wrapped__(Path(out))(config, **{**common, **own, **changes})
    start: Any = models["policy"]
    if name == "dapo":  # its reference is loaded from where the policy was
        start = f"{tempfile.mkdtemp()}/policy"
        _save(models["policy"], start)
    extra: dict[str, Any] = {"peft_config": _lora()} if lora else {}
    if name in ("ppo", "decoupled", "distill"):
        extra["value_model"] = models["value"]
    if name == "distill":
        extra["teacher"] = models["teacher"]
    rollout = with_logprobs(models["start"], 3) if name == "dppo" else given_completions
    extra["rollout_func"] = rollout
    return cls(start, by_length, args, train_dataset=conftest.prompts.__wrapped__(), processing_class=tokenizer, **extra)


def _pairs() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"{a + b + 1}{a}"} for a in range(8) for b in range(8)]
    )


def write_pairs(file: Path) -> None:
    _pairs().to_parquet(file)


def _make_dpo(model: Any, reference: Any, out: str, options: dict[str, Any], lora: bool) -> DPOTrainer:
    file = options.pop("pairs", None)
    data = _pairs() if file is None else Dataset.from_parquet(file, cache_dir=str(Path(file).parent))
    del options["steps_per_generation"]
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": 3}
    settings |= {"gradient_checkpointing": False, "logging_steps": 1, "lr_scheduler_type": "constant"}
    args = DPOConfig(out, **{**settings, **options})
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=g)
    extra: dict[str, Any] = {"peft_config": _lora()} if lora else {"ref_model": reference}
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **extra)


def _save(model: Any, folder: str) -> None:
    """`save_pretrained` of every rank: that of transformers writes on the first alone."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})


def _lora() -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"], r=4, lora_dropout=0.0, init_lora_weights=False
    )


def whole(parameter: Any) -> Tensor:
    """A parameter that may be sharded."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def weights(trainer: Any) -> dict[str, Tensor]:
    """Of policy and values, by name."""
    found = {name: whole(p) for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    values = getattr(trainer, "value_model", None)
    return found | ({} if values is None else {f"values.{name}": whole(p) for name, p in values.named_parameters()})


def train(
    wrapper: str | None, name: str, options: dict[str, Any], out: str | None = None, resume: str | None = None, broken: str = ""
) -> dict[str, Any]:
    """What six steps made of the weights, and what was logged; without the synchronisation that is `broken`."""
    torch.manual_seed(0)
    trainer = make(name, wrapper, out or tempfile.mkdtemp(), **options)
    before = weights(trainer)
    if broken == "values":
        trainer._wrap_value_model = lambda: None
    elif broken == "policy":  # a loss that is computed beside the wrapper
        score = trainer._score
        trainer._score = lambda model, *args, **inputs: score(trainer.accelerator.unwrap_model(model), *args, **inputs)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "before": before,
        "weights": weights(trainer),
        "wrapper": type(trainer.model_wrapped).__name__,
        "processes": trainer.accelerator.num_processes,
        "logged": [{name: float(x) for name, x in row.items()} for row in trainer.state.log_history[:-1]],
    }


def rollouts(wrapper: str | None) -> dict[str, Any]:
    """Training on what the model itself writes, to different lengths on each process."""
    model = policy()
    model.generation_config.eos_token_id = [1, *range(20, 50)]
    args = _dppo_config(wrapper, max_completion_length=12)
    trainer = DPPOTrainer(model, by_length, args, train_dataset=conftest.prompts.__wrapped__(), processing_class=tokenizer)
    lengths: list[int] = []
    generate = trainer._generate_single_turn

    def watched(*given: Any, **options: Any) -> Any:
        found = generate(*given, **options)
        lengths.append(max(map(len, found[0])))
        return found

    trainer._generate_single_turn = watched  # type: ignore[method-assign]
    trainer.train()
    mismatch = conftest.history(trainer, "engine_mismatch/prob_gap_max")
    return {"lengths": lengths, "mismatch": mismatch, "weights": weights(trainer)}


def _dppo_config(wrapper: str | None, **changes: Any) -> DPPOConfig:
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 1, "num_iterations": 1, "max_steps": 3}
    settings |= {"divergence_type": "topk_kl", "divergence_topk": 3, **engine_settings(wrapper), **changes}
    return conftest.make_config.__wrapped__(Path(tempfile.mkdtemp()))(DPPOConfig, **settings)


def is_divided(parameter: Any) -> bool:
    """Whether this process holds a part of it, and not the whole."""
    if hasattr(parameter, "ds_id"):
        return parameter.ds_status.name == "NOT_AVAILABLE"
    return isinstance(parameter, DTensor)


def divided(wrapper: str) -> dict[str, bool]:
    """Which models of a trainer with all of them are, after training and after scores without a gradient."""
    trainer = make("distill", wrapper, tempfile.mkdtemp(), max_steps=2)
    trainer.train()
    models = {"policy": trainer.model, "reference": trainer.ref_model, "teacher": trainer.teacher.model}
    ids = torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        for model in (trainer.model_wrapped, trainer.ref_model):
            trainer._score(model, ids, torch.ones_like(ids), ids[:, -2:])
        hidden = trainer.teacher.hidden(ids, torch.ones_like(ids), 2)
        with trainer.teacher.side(hidden, None) as side:
            whole_inside = side["weight"].shape == (len(tokenizer), 48) and not is_divided(side["weight"])
    found = {name: all(map(is_divided, model.parameters())) for name, model in models.items()}
    return {**found, "whole inside": whole_inside, "values": any(map(is_divided, trainer.value_model.parameters()))}


def wrapped_layers(wrapper: str) -> dict[str, bool]:
    """Whether all layers of policy and teacher, which are of different classes, are units of FSDP2."""
    trainer = make("distill", wrapper, tempfile.mkdtemp(), max_steps=2, teacher="granite")
    trainer.train()
    models = {"policy": trainer.model, "teacher": trainer.teacher.model}
    return {name: all(isinstance(x, FSDPModule) for x in model.base_model.layers) for name, model in models.items()}


def gatherings(wrapper: str, tied: bool) -> dict[str, Any]:
    """How often FSDP2 gathers the head for a training step; whether it is whole in the first layer, and after scoring."""
    model = policy(tied)
    trainer = DPPOTrainer(
        model,
        by_length,
        _dppo_config(wrapper, max_steps=2),
        train_dataset=conftest.prompts.__wrapped__(),
        processing_class=tokenizer,
        rollout_func=with_logprobs(policy(tied).eval(), 3),
    )
    head = model.get_output_embeddings()
    size, gathered, sharded = sum(p.numel() for p in (head.weight, model.model.norm.weight)), [0], []
    gather = dist.all_gather_single

    def counted(output: Tensor, *args: Any, **options: Any) -> Any:
        gathered[0] += size <= output.numel() < size + 8
        return gather(output, *args, **options)

    dist.all_gather_single = counted
    model.model.layers[0].register_forward_pre_hook(lambda *_: sharded.append(isinstance(head.weight, DTensor)))
    step = trainer.training_step
    per_step = []

    def stepped(*args: Any, **options: Any) -> Any:
        gathered[0] = 0
        loss = step(*args, **options)
        per_step.append(gathered[0])
        return loss

    trainer.training_step = stepped  # type: ignore[method-assign]
    trainer.train()
    everywhere = all(isinstance(p, DTensor) for p in model.parameters())
    ids = torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        trainer._score(trainer.model, ids, torch.ones_like(ids), ids[:, -2:])
    after_scoring = isinstance(head.weight, DTensor)
    return {"per_step": per_step, "in_layers": sharded, "after_training": everywhere, "after_scoring": after_scoring}


def precision(wrapper: str) -> dict[str, Any]:
    """In bfloat16: whether log-probs reach the loss with all their bits, and leave the model in float32."""
    trainer = make("dppo", wrapper, tempfile.mkdtemp(), bf16=True, max_steps=2)
    compute, given, reached, scored = scoring.linear_policy_loss, [], [], []

    def watched(*args: Any, **options: Any) -> Any:
        reached.append(options["anchor_logprobs"])
        loss, stats, aux = compute(*args, **options)
        scored.append(aux.logprobs)
        return loss, stats, aux

    scoring.linear_policy_loss = watched
    loss_of, score = trainer._compute_loss, trainer._score

    def losing(model: Any, inputs: dict[str, Any]) -> Tensor:
        given.append(inputs["sampling_per_token_logps"])
        return loss_of(model, inputs)

    left = []

    def scoring_(*args: Any, **options: Any) -> Any:
        found = score(*args, **options)
        left.append(found.logprobs)
        return found

    trainer._compute_loss, trainer._score = losing, scoring_
    trainer.train()
    return {
        "in": all(map(torch.equal, given, reached)) and len(given) == 2,
        "out": all(map(torch.equal, scored, left)),
        "digits": all(bool((x != x.bfloat16()).any()) for x in (*given, *left)),
        "hidden": next(p.dtype for p in trainer.model.parameters()),
    }
