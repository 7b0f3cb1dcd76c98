"""DAPO's dynamic sampling on GRPOTrainer: rounds of new prompts until a training batch of groups with mixed answers is full."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather, gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from dppo_kernels.trainers.completions_table import TableRows, cut_rows, dump_rows, fill_table, load_rows
from dppo_kernels.trainers.normaliser import active_tokens
from dppo_kernels.trainers.rollout_groups import Rows, blank_rows, concatenate, hand_over, take_rows
from dppo_kernels.trainers.sampling import Collected, Group, PromptStream, RefillRule, Verdict, collect, judge, share_out
from dppo_kernels.trainers.sampling_metrics import batch_metrics, combine_metrics, generated_rewards, moments

if TYPE_CHECKING:
    from dppo_kernels.trainers.policy_trainer import PolicyTrainer as Host
else:
    Host = object  # a mixin: a PolicyTrainer comes after it in the bases

logger = get_logger(__name__)

ACCURACY = "acc"  # column that reward functions report through TRL's `log_extra`
PENALTY = "overlong_penalty"  # a reward function that shapes the reward, and says nothing of being right


class Scored(NamedTuple):
    """Rewards of one round over all processes, and what groups are filtered by."""

    per_function: Tensor  # [rows, functions], NaN where a function gave None
    rewards: Tensor  # [rows], weighted sums; NaN where no function gave a reward
    metric: Tensor | None  # [rows]


class Round(NamedTuple):
    """One call of GRPO's generation and scoring."""

    share: int  # groups of every process
    batch: dict[str, Any]  # rows of this process
    scored: Scored
    verdicts: list[Verdict]  # one a group, over all processes
    metrics: dict[str, list[float]]
    logs: dict[str, Any]  # rows of the completions table, of all processes


class Carried(NamedTuple):
    """A group with mixed answers that the batch before had no room for."""

    owner: int  # process that holds its rows
    rewards: list[float]
    table: str  # its rows of the completions table, see `dump_rows`


class DynamicSamplingMixin(Host):
    """Put before a `PolicyTrainer` in the bases. With `args.filter_groups_enable`, prompts come from a stream of its own.

    The stream is a permutation of the dataset per epoch, as TRL's sampler draws it, of which no prompt is lost or repeated;
    what the dataloader yields is ignored. Every process generates whole groups and knows the verdicts on all of them, so all
    decide alike; groups move between processes only where one has too many. Optimiser steps are counted as without filtering,
    but training also ends when prompts have been drawn for `num_train_epochs` and `max_steps` is not set.
    """

    _scored: Scored
    _logs: dict[str, Any]  # TRL's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prompts: PromptStream | None = None
        if self.args.filter_groups_enable:
            size = getattr(self.train_dataset, "__len__", None)
            if size is None:
                raise ValueError("`filter_groups_enable` refills from a dataset of known length, got an IterableDataset")
            self._prompts = PromptStream(size(), seed=self.args.seed, shuffle=self.shuffle_dataset)
            self.add_callback(_StopAfterEpochs(self))
        self._carried: list[Carried] = []
        self._carried_rows: dict[int, Rows] = {}  # of this process, by place in `_carried`
        self._trains_stale = False  # whether the buffered batch holds groups of an earlier policy

    def refill_rule(self) -> RefillRule:
        """The rule that the settings describe."""
        need = self.args.generation_batch_size // self.num_generations
        return RefillRule(
            need=need,
            per_round=self.args.filter_gen_batch_size or need,
            fitted=self.args.filter_gen_batch_size is None,
            multiple=self.accelerator.num_processes,
            max_rounds=self.args.max_filter_gen_batches,
            exhausted=self.args.filter_exhausted,
            surplus=self.args.filter_surplus,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._prompts is not None:  # a second call starts over; a resumed one gets its position back
            self._prompts.position = 0
        self._carried, self._carried_rows, self._trains_stale = [], {}, False
        return super().train(*args, **kwargs)

    def prompts_used_up(self) -> bool:
        """Whether the prompts of `num_train_epochs` have been drawn, and the batches made of them are trained on."""
        if self._prompts is None or self.args.max_steps > 0 or self._prompts.epochs < self.args.num_train_epochs:
            return False
        return self.needs_rollout_next()

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.prompts_used_up():  # a finished run that is resumed
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def needs_rollout_next(self) -> bool:
        """Whether the next optimiser step generates."""
        period = self.args.steps_per_generation * self.num_iterations
        return -self._step % period < self.args.gradient_accumulation_steps

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> Tensor:
        per_function = super()._calculate_rewards(inputs, *args)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        rewards[per_function.isnan().all(1)] = torch.nan
        filters = self._prompts is not None and self.model.training
        metric = self._filter_metric(per_function, rewards, len(inputs)) if filters else None
        self._scored = Scored(per_function, rewards, metric)
        return per_function

    def _filter_metric(self, per_function: Tensor, rewards: Tensor, rows: int) -> Tensor:
        name = self.args.filter_groups_metric
        # Another process may have reported what this one has not, and a collective follows.
        if any(gather_object([(name or ACCURACY) in self._pending_extra_logs])):
            reported = self._pending_extra_logs.get(name or ACCURACY, [None] * rows)
            if len(reported) != rows:
                raise ValueError(f"{len(reported)} values of `{name or ACCURACY}` were reported for {rows} completions")
            values = [math.nan if value is None else float(value) for value in reported]
            return gather(torch.tensor(values, dtype=torch.float32, device=per_function.device))
        if name == "reward":
            return rewards
        judging = [function for function in self.reward_func_names if function != PENALTY]
        if name is None and len(judging) == 1:
            name = judging[0]
        if name not in self.reward_func_names:
            raise ValueError(
                f"`filter_groups_metric`={self.args.filter_groups_metric!r}: no reward function reported a column "
                f"`{name or ACCURACY}` through `log_extra`; name 'reward' or one of {', '.join(self.reward_func_names)}"
            )
        return per_function[:, self.reward_func_names.index(name)]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._prompts is not None and self.model.training:
            return self._collect(self._prompts)
        output = super()._generate_and_score_completions(inputs)
        logged = self._metrics["train" if self.model.training else "eval"]
        for name, value in moments("reward", self._scored.rewards).items():
            logged[name].append(value)
        return output

    def _collect(self, prompts: PromptStream) -> dict[str, Any]:
        rule, rounds = self.refill_rule(), []

        def generate(rows: list[int]) -> list[Verdict]:
            rounds.append(self._generate_round(rows, rule))
            return rounds[-1].verdicts

        collected = collect(prompts, rule, generate, carried=len(self._carried))
        batch = self._assemble(collected, rounds, rule)
        self._log_collected(collected, rounds, rule, prompts.epochs)
        self._trains_stale = any(group.round < 0 for group in collected.trained)
        self._keep_carried(collected, rounds)
        return batch

    def _generate_round(self, rows: Sequence[int], rule: RefillRule) -> Round:
        share = len(rows) // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        inputs = [dict(self.train_dataset[row]) for row in rows[first : first + share] for _ in range(self.num_generations)]
        with self._set_aside() as (metrics, logs):
            batch = super()._generate_and_score_completions(inputs)
        scored = self._scored
        assert scored.metric is not None  # training, with filtering
        grouped = (x.view(-1, self.num_generations) for x in (scored.metric, scored.rewards))
        if rule.surplus == "carry" and not self.captures_rollout and "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = self._behaviour_logprobs(batch)
        return Round(share, batch, scored, judge(*grouped), metrics, logs)

    @contextmanager
    def _set_aside(self) -> Iterator[tuple[dict[str, list[float]], dict[str, Any]]]:
        """What is logged inside goes to the dicts that this yields: a round's rows may turn out not to be trained on."""
        metrics: dict[str, list[float]] = defaultdict(list)
        logs: dict[str, Any] = {name: defaultdict(list) if isinstance(x, dict) else [] for name, x in self._logs.items()}
        before = self._metrics["train"], self._logs
        self._metrics["train"], self._logs = metrics, logs
        try:
            yield metrics, logs
        finally:
            self._metrics["train"], self._logs = before

    @torch.no_grad()
    def _behaviour_logprobs(self, batch: Mapping[str, Any]) -> Tensor | None:
        """On-policy, GRPO needs no old log-probs; a group that waits for the next batch does."""
        logprobs, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            batch["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
        )
        return logprobs

    @property
    def _per_sequence(self) -> tuple[str, ...]:
        return ("importance_sampling_ratio",) if self.args.vllm_importance_sampling_mode.startswith("sequence") else ()

    def _owner(self, group: Group, rounds: Sequence[Round]) -> int:
        if group.round < 0:
            return self._carried[group.place].owner
        return group.place // rounds[group.round].share

    def _rows(self, group: Group, rounds: Sequence[Round]) -> Rows:
        """Of a group that this process holds."""
        if group.round < 0:
            return self._carried_rows[group.place]
        place = group.place % rounds[group.round].share * self.num_generations
        rows = take_rows(rounds[group.round].batch, slice(place, place + self.num_generations), per_sequence=self._per_sequence)
        rows["stale"] = torch.zeros_like(rows["advantages"], dtype=torch.bool)
        return rows

    def _assemble(self, collected: Collected, rounds: Sequence[Round], rule: RefillRule) -> dict[str, Any]:
        """The batch that this process trains on; where groups are missing, blank rows take their place."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        owners = [self._owner(group, rounds) for group in collected.trained]
        takers = share_out(owners, processes)
        mine = {
            place: self._rows(group, rounds)
            for place, (group, owner) in enumerate(zip(collected.trained, owners, strict=True))
            if owner == process
        }
        held = hand_over(mine, takers, owners, process)
        device = self.accelerator.device
        parts = [{name: x.to(device) for name, x in held[place].items()} for place in sorted(held)]
        missing = rule.need // processes * self.num_generations - sum(len(part["advantages"]) for part in parts)
        if missing:
            template = parts[0] if parts else self._rows(Group(0, rounds[0].share * process), rounds)
            parts.append(blank_rows(template, missing))
        batch: dict[str, Any] = concatenate(parts, pad_token_id=self._tokenizer.pad_token_id, per_sequence=self._per_sequence)
        batch["num_items_in_batch"] = self.accelerator.reduce(active_tokens(batch).sum(), reduction="sum")
        if len(collected.trained) < rule.need:
            batch["filled"] = torch.tensor(len(collected.trained) / rule.need, device=device)
        return batch

    def _rewards(self, group: Group, rounds: Sequence[Round]) -> list[float]:
        if group.round < 0:
            return self._carried[group.place].rewards
        first = group.place * self.num_generations
        return rounds[group.round].scored.rewards[first : first + self.num_generations].tolist()

    def _keep_carried(self, collected: Collected, rounds: Sequence[Round]) -> None:
        carried = [
            Carried(
                self._owner(group, rounds),
                self._rewards(group, rounds),
                dump_rows(self._table_rows(group, rounds)),
            )
            for group in collected.carried
        ]
        rows = {}
        for index, group in enumerate(collected.carried):
            if carried[index].owner == self.accelerator.process_index:
                rows[index] = {name: x.clone() for name, x in self._rows(group, rounds).items()}
                rows[index]["stale"].fill_(True)
        self._carried, self._carried_rows = carried, rows

    def _log_collected(self, collected: Collected, rounds: Sequence[Round], rule: RefillRule, epochs: float) -> None:
        values = combine_metrics([r.metrics for r in rounds], [r.share for r in rounds])
        if rounds:
            per_function = torch.cat([r.scored.per_function for r in rounds])
            values |= generated_rewards(per_function, torch.cat([r.scored.rewards for r in rounds]), self.reward_func_names)
        trained = torch.tensor([self._rewards(group, rounds) for group in collected.trained])
        values |= batch_metrics(collected, rule, trained, epochs)
        logged = self._metrics["train"]
        for name, value in values.items():
            logged[name].append(value)
        logged["num_tokens"] = [self.state.num_input_tokens_seen]  # a total, of which TRL keeps the last
        fill_table(self._logs, [self._table_rows(group, rounds) for group in collected.trained])

    def _table_rows(self, group: Group, rounds: Sequence[Round]) -> TableRows:
        if group.round < 0:
            return load_rows(self._carried[group.place].table)
        return cut_rows(rounds[group.round].logs, group.place * self.num_generations, self.num_generations)

    def resume_signature(self) -> dict[str, float | str]:
        filters = self._prompts is not None
        carries = filters and self.args.filter_surplus == "carry"  # waiting groups must have the tensors of fresh ones
        return {**super().resume_signature(), "filter_groups_enable": int(filters), "carries": int(carries)}

    def extra_resume_state(self) -> dict[str, Any]:
        carried = {
            "groups": [tuple(group) for group in self._carried],
            "rows": self._carried_rows,
            "trains_stale": self._trains_stale,
        }
        return {**super().extra_resume_state(), "carried": carried}

    def load_extra_resume_state(self, state: dict[str, Any]) -> None:
        super().load_extra_resume_state(state)
        self._carried = [Carried(*group) for group in state["carried"]["groups"]]
        self._carried_rows = state["carried"]["rows"]
        self._trains_stale = state["carried"]["trains_stale"]

    def portable_resume_state(self) -> dict[str, Any]:
        if self._prompts is None:
            return super().portable_resume_state()
        stream = {"position": self._prompts.position, "size": self._prompts.size}
        return {**super().portable_resume_state(), "prompts": stream}

    def load_portable_resume_state(self, state: dict[str, Any]) -> None:
        super().load_portable_resume_state(state)
        if self._prompts is None or "prompts" not in state:
            return
        if state["prompts"]["size"] != self._prompts.size:
            logger.warning(
                f"the checkpoint drew from {state['prompts']['size']} prompts, the dataset has {self._prompts.size}: they are "
                "drawn from the start"
            )
            return
        self._prompts.position = state["prompts"]["position"]

    def _scored_on_unchanged_weights(self) -> bool:
        return super()._scored_on_unchanged_weights() and not (self.model.training and self._trains_stale)


class _StopAfterEpochs(TrainerCallback):
    """Ends training where the prompts of `num_train_epochs` have been drawn, and the batches made of them are used up."""

    def __init__(self, trainer: DynamicSamplingMixin) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.prompts_used_up():
            control.should_training_stop = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS  # as at the last of `max_steps`
