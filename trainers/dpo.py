"""DPO and its family on TRL's DPOTrainer, trained through `linear_preference_loss`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor

from dppo_kernels import PreferenceSpec, Stat, _checks
from dppo_kernels.linear_preference_loss.op import TOKEN_OUTPUTS
from dppo_kernels.trainers import _trl_seam
from dppo_kernels.trainers._trl_seam import TRLDPOConfig, TRLDPOTrainer, disable_gradient_checkpointing, use_adapter
from dppo_kernels.trainers.checkpoint import AtomicCheckpointMixin
from dppo_kernels.trainers.metrics import StatLoggingMixin
from dppo_kernels.trainers.preference_scoring import install_preference_scoring
from dppo_kernels.trainers.sharding import EngineMixin

logger = get_logger(__name__)

# Losses that TRL does not have, and those of TRL that take the same settings: its constructor sees these.
_OWN_LOSSES = {"sigmoid_smoothed": "sigmoid", "ipo_sum": "ipo"}
_SMOOTHED = {"sigmoid_smoothed", "robust", "exo_pair", "aot", "aot_unpaired"}

_PRECISE = ("ref_chosen_logps", "ref_rejected_logps")  # float64: sums over many tokens, of which differences are taken

# Logged name -> (stat, how it is read): TRL's names.
METRICS = {
    "rewards/chosen": ("rewards_chosen", "mean"),
    "rewards/rejected": ("rewards_rejected", "mean"),
    "rewards/accuracies": ("accuracies", "mean"),
    "rewards/margins": ("margins", "mean"),
    "logps/chosen": ("logprobs_chosen", "mean"),
    "logps/rejected": ("logprobs_rejected", "mean"),
    "entropy": ("entropy", "mean"),
    "logits/chosen": ("mean_logits_chosen", "mean"),
    "logits/rejected": ("mean_logits_rejected", "mean"),
    "mean_token_accuracy": ("top1_chosen", "mean"),
    "aux_loss": ("aux_loss", "mean"),
}


@dataclass
class DPOConfig(TRLDPOConfig):
    """TRL's DPOConfig; its options mean what they mean there.

    Args:
        loss_type: TRL's losses, and "sigmoid_smoothed" (cDPO: the label smoothing that TRL's "sigmoid" ignores) and "ipo_sum"
            (IPO by sums over tokens, as in its paper). See `PreferenceSpec`.
        token_metrics: log "entropy", "logits/*" and "mean_token_accuracy", as TRL does. False saves their passes over the
            logits; with a soft-cap of the logits, whose mean needs the logits themselves, it saves a projection.
        workspace_bytes: as in `linear_preference_loss`.

    Raises:
        ValueError: a setting that cannot be honoured, with the reason.
    """

    token_metrics: bool = field(default=True, metadata={"help": "Log entropy, logits/* and mean_token_accuracy."})
    workspace_bytes: int | None = field(default=None, metadata={"help": "Memory of exponentials (default: by device)."})

    def __post_init__(self) -> None:
        if self.padding_free:
            raise ValueError("`padding_free`=True would be ignored by DPO, in TRL as well: leave it at False")
        _checks.check_workspace_bytes(self.workspace_bytes)
        super().__post_init__()
        spec = self.preference_spec()
        if self.label_smoothing and not _SMOOTHED & set(spec.loss_type):
            logger.warning(
                f"`label_smoothing`={self.label_smoothing} is ignored by `loss_type`={list(spec.loss_type)}, as in TRL: "
                "'sigmoid_smoothed' is the loss of cDPO"
            )

    def preference_spec(self) -> PreferenceSpec:
        """The loss these settings describe."""
        weights = self.loss_weights
        return PreferenceSpec(
            tuple(self.loss_type),
            loss_weights=None if weights is None else tuple(weights),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            ld_alpha=self.ld_alpha,
            discopop_tau=self.discopop_tau,
            use_weighting=self.use_weighting,
        )


class DPOTrainer(AtomicCheckpointMixin, StatLoggingMixin, EngineMixin, TRLDPOTrainer):
    """TRL's DPOTrainer whose loss is computed from hidden states, inside the model's forward, with its gradient.

    Takes TRL's arguments; `args` is a `DPOConfig`. Losses, gradients and metrics are TRL's up to rounding (metrics are means
    over all pairs or tokens of a logging window). Only tokens of completions enter the head's GEMMs. Policy and reference are
    scored by the same operations: the loss of the first step is exactly log 2 (of "sigmoid"), and log 2 up to rounding where
    the reference was precomputed, in other batches.

    Raises:
        TypeError, ValueError: a model or setting that cannot be trained correctly, with the reason.
    """

    data_collator: Any
    _precompute_model_hash: Any

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is None:
            args = DPOConfig("dpo-output")
        if not isinstance(args, DPOConfig):
            raise TypeError(f"`args` must be a DPOConfig of dppo_kernels, got {type(args).__name__}")
        self.spec, self.stat_metrics = args.preference_spec(), METRICS
        self._new_tokens: Tensor | None = None  # of this process since the last log
        self._scoring_installed = False
        with _known_to_trl(args):
            super().__init__(model, ref_model, args, *rest, **kwargs)
        _trl_seam.check_dpo_attributes(self)
        self.loss_types = args.loss_type
        self._install_scoring()
        if args.precompute_ref_log_probs:
            self.data_collator = _PreciseCollator(self.data_collator)

    def _install_scoring(self) -> None:
        if self._scoring_installed:
            return
        self._check_setup()
        self._scoring_installed = True
        for scored in (self.model, self.ref_model):
            if scored is not None:
                scored = self.accelerator.unwrap_model(scored)
                install_preference_scoring(scored.get_base_model() if is_peft_model(scored) else scored)

    def _check_setup(self) -> None:
        if self._is_vlm:
            raise ValueError("vision-language models are not supported yet: pass a text model and tokenizer")
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt-learning PEFT (prompt, prefix, p-tuning) is not supported: use LoRA or another adapter")

    def _score(self, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """The models' own inputs of a batch, and what is to be scored of its completions."""
        known = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        own = {name: value for name, value in inputs.items() if name not in known}
        if self.aux_loss_enabled and "spec" in options:
            own["output_router_logits"] = True
        common = {"workspace_bytes": self.args.workspace_bytes, "outputs": TOKEN_OUTPUTS if self.args.token_metrics else ()}
        return model(**own, preference={"completion_mask": inputs["completion_mask"], **common, **options})

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        for name in _PRECISE:  # with DeepSpeed, transformers casts floats to the model's dtype
            if name in inputs:
                prepared[name] = inputs[name].to(self.args.device)
        return prepared

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probs of chosen and rejected sequences under the reference, float64 [P] each."""
        self._install_scoring()  # TRL precomputes them in its constructor
        adapter: Any = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            found = self._score(model, inputs, reference_of=self.spec).sequence_logprobs
        return found.chunk(2)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Under a hash of all that the values depend on: TRL's cache, which runs share, tells models and datasets apart."""
        models, args = self._precompute_model_hash, self.args
        scored = (self.spec.ld_alpha, args.max_length, args.truncation_mode, self.accelerator.mixed_precision)
        self._precompute_model_hash = ("dppo_kernels", models, *scored)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = models

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.precompute_ref_logps:
            reference = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        else:
            reference = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
        found = self._score(model, inputs, spec=self.spec, ref_logprobs=torch.cat(reference))
        loss, stats = found.loss, dict(found.stats)
        if found.aux_loss is not None:
            aux_loss = found.aux_loss.detach()
            loss = loss + self.router_aux_loss_coef * found.aux_loss
            stats["aux_loss"] = Stat(aux_loss, torch.ones_like(aux_loss), aux_loss)
        self.record(stats)
        if self.model.training:
            tokens = inputs["attention_mask"].sum()
            self._new_tokens = tokens if self._new_tokens is None else self._new_tokens + tokens
        if not return_outputs:
            return loss
        with torch.no_grad():  # for `compute_metrics`, which wants logits
            plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return loss, model(**plain, use_cache=False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._new_tokens is not None:
            self._total_train_tokens += self.accelerator.reduce(self._new_tokens, reduction="sum").item() // self._tp_size
            self._new_tokens = None
        if self._stats[mode]:
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)


@contextmanager
def _known_to_trl(args: DPOConfig) -> Iterator[None]:
    """TRL's constructor checks names of losses: it sees one of its own for each of ours."""
    given = args.loss_type
    args.loss_type = [_OWN_LOSSES.get(name, name) for name in given]
    try:
        yield
    finally:
        args.loss_type = given


class _PreciseCollator:
    """TRL's collator makes precomputed log-probs float32."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for name in _PRECISE:
            if name in batch:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float64)
        return batch
