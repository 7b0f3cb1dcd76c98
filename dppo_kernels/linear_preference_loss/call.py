"""Checked arguments of a call, as rows in working order."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dppo_kernels import _backend, _checks
from dppo_kernels._lora import LoraWeight, split_head, vocabulary
from dppo_kernels._numerics import compute_dtype_of, split_temperature, stat_dtype
from dppo_kernels._shard import VocabShard, take_shard
from dppo_kernels.linear_logprobs.op import check_head, check_linear_arguments
from dppo_kernels.linear_preference_loss.rows import Layout
from dppo_kernels.linear_preference_loss.task import Task
from dppo_kernels.preference import sequence_lengths, token_weights
from dppo_kernels.preference_spec import PreferenceSpec

if TYPE_CHECKING:  # not in builds of torch without it
    from torch.distributed import ProcessGroup


class Head(NamedTuple):
    """What turns projections into logits, and which ranks hold it."""

    bias: Tensor | None
    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    process_group: "ProcessGroup | None"
    vocab_start: int | None
    vocab_size: int | None


class Model(NamedTuple):
    """Rows and head of a model."""

    hidden: Tensor  # [N, H]
    weight: Tensor | LoraWeight
    bias: Tensor | None
    compute_dtype: torch.dtype
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # as the op takes them

    @classmethod
    def of(cls, layout: Layout, mask: Tensor, hidden: Tensor, weight: Tensor | LoraWeight, bias: Tensor | None) -> "Model":
        compute_dtype, rows = compute_dtype_of(hidden), layout.rows(hidden)
        base, low_hidden, low_weight = split_head(weight, rows, mask, compute_dtype)
        inputs = (rows, base, None if bias is None else bias.contiguous(), low_hidden, low_weight)
        return cls(rows, weight, bias, compute_dtype, inputs)


@dataclass(frozen=True)
class Call:
    """What the loss and the scoring share."""

    layout: Layout
    policy: Model
    ids: Tensor  # int64 [N]
    mask: Tensor  # bool [N]
    row_temperature: Tensor | None  # [N]
    temperature: float
    logit_scale: float
    softcap: float | None
    shard: VocabShard | None  # of both models' heads
    backend: str

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor | LoraWeight,
        ids: Tensor,
        loss_mask: Tensor,
        head: Head,
        sequence_ids: Tensor | None,
        n_pairs: int | None,
        backend: str | None,
    ) -> "Call":
        bias, temperature, logit_scale, softcap, group, start, size = head
        weight, bias, shard = take_shard(weight, bias, group, start, size)
        check_linear_arguments(hidden, weight, ids, bias, None, temperature, logit_scale, softcap)
        _checks.check_mask("loss_mask", loss_mask)
        _checks.check_shape("loss_mask", loss_mask, ids.shape, "that of `ids`")
        _checks.check_device("loss_mask", loss_mask, "hidden", hidden)
        layout = Layout.of(ids, sequence_ids, n_pairs)
        mask, compute_dtype = layout.rows(loss_mask), compute_dtype_of(hidden)
        name = _backend.resolve("linear_preference_loss", backend, hidden.device, compute_dtype)
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = layout.rows(temperature)
        by_row, scalar = split_temperature(temperature, mask.shape[0], stat_dtype(compute_dtype))
        policy = Model.of(layout, mask, hidden, weight, bias)
        return cls(layout, policy, layout.rows(ids).long(), mask, by_row, scalar, logit_scale, softcap, shard, name)

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and results."""
        return stat_dtype(self.policy.compute_dtype)

    def reference(
        self,
        ref_logprobs: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | LoraWeight | None,
        ref_bias: Tensor | None,
        place: "tuple[ProcessGroup | None, int | None, int | None]",
    ) -> Model | None:
        """The reference model, if its hidden states are given."""
        hidden, layout = self.policy.hidden, self.layout
        if (ref_logprobs is None) == (ref_hidden is None) or (ref_hidden is None) != (ref_weight is None):
            raise ValueError("a reference is needed: either `ref_logprobs`, or `ref_hidden` and `ref_weight`")
        if ref_hidden is None or ref_weight is None:
            assert ref_logprobs is not None
            if ref_bias is not None:
                raise ValueError("`ref_bias` is of a reference's `ref_weight`, but `ref_logprobs` are given")
            _checks.check_floating("ref_logprobs", ref_logprobs)
            _checks.check_shape("ref_logprobs", ref_logprobs, (2 * layout.n_pairs,), "[2P]")
            _checks.check_device("ref_logprobs", ref_logprobs, "hidden", hidden)
            return None
        ref_weight, ref_bias, shard = take_shard(ref_weight, ref_bias, *place, prefix="ref_")
        lead = (self.ids.shape[0],) if layout.length is None else (2 * layout.n_pairs, layout.length)
        check_head(ref_hidden, ref_weight, ref_bias, 1.0, None, lead=("ids", lead), prefix="ref_")
        _checks.check_device("ref_hidden", ref_hidden, "hidden", hidden)
        sizes = [vocabulary(x) for x in (self.policy.weight, ref_weight)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"`weight` has a vocabulary of {sizes[0]} and `ref_weight` one of {sizes[1]}")
        if shard != self.shard:
            raise ValueError("`ref_weight` must be sharded as `weight` is")
        with torch.no_grad():
            model = Model.of(layout, self.mask, ref_hidden.detach(), ref_weight, ref_bias)
        if stat_dtype(model.compute_dtype) != self.dtype:
            raise TypeError(f"`hidden` is {hidden.dtype} and `ref_hidden` is {ref_hidden.dtype}: both or none in float64")
        return model

    def task(
        self,
        spec: PreferenceSpec,
        ref_logprobs: Tensor | None,
        denominator: Tensor | None = None,
        token_denominator: Tensor | None = None,
    ) -> Task:
        sequences, n_pairs = self.layout.sequences, self.layout.n_pairs
        row_weights = token_weights(sequences, self.mask, n_pairs, spec.ld_alpha, self.dtype)
        ref_logprobs = None if ref_logprobs is None else ref_logprobs.detach().double()
        lengths = sequence_lengths(sequences, self.mask, n_pairs)
        return Task(sequences, self.mask, row_weights, lengths, n_pairs, spec, ref_logprobs, denominator, token_denominator)
