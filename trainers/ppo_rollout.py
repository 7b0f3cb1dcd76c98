"""From GRPO's rollouts to PPO's: scores and KL as token rewards, values, advantages and returns."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dppo_kernels import Moments, gae, kl_estimate, length_adaptive_lambda, masked_moments, token_rewards, whiten
from dppo_kernels.control import KLController
from dppo_kernels.returns import explained_by_moments
from dppo_kernels.trainers.normaliser import active_tokens, whole_sequences
from dppo_kernels.trainers.ppo_config import PPOConfig
from dppo_kernels.trainers.scoring import IGNORE_INDEX
from dppo_kernels.trainers.value_model import SharedHead, TokenValues

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: GRPOTrainer comes after it in the bases


class PPORolloutMixin(Host):
    """Put before GRPOTrainer in the bases. Rollouts come back with ``advantages``, ``returns`` and ``old_values`` [B, T].

    Completions without a score (every reward function said None) are masked out; "objective/unscored" counts them.
    """

    args: PPOConfig
    kl_controller: KLController
    value_model: TokenValues | SharedHead
    update_count = 0  # rollouts for training so far

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.update_count = 0
        self.kl_controller = self.args.kl_controller()
        return super().train(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._scores = self.process_scores(torch.where(rewards.isnan().all(1), torch.nan, scores))
        return rewards

    def process_scores(self, scores: Tensor) -> Tensor:
        """Scores [B] of all processes, the same on each and NaN where there is none, as they enter the token rewards."""
        return scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        self.update_count += self.model.training
        output = super()._generate_and_score_completions(inputs)
        written = active_tokens(output)
        rows, process = written.shape[0], self.accelerator.process_index
        scores = self._scores[process * rows : (process + 1) * rows]
        unscored = scores.isnan()
        output["completion_mask"] = output["completion_mask"].masked_fill(unscored[:, None], 0)
        mask = written & ~unscored[:, None]
        scores = torch.where(unscored, 0.0, scores)
        ended = self._ended(output)
        if self.args.missing_eos_penalty is not None:
            scores = torch.where(ended, scores, scores - self.args.missing_eos_penalty)
        kl = self._kl(output, mask)
        coef = self.kl_controller.coef
        rewards = token_rewards(scores, mask, kl=kl, kl_coef=coef)
        if self.args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, moments=self.moments(rewards, mask))
        values = self.rollout_values(output)
        lam: float | Tensor = self.args.lam
        lam_value = self.args.lam_value  # None: that of the advantages, in one sum for both
        if self.args.length_adaptive_alpha is not None:
            lam = length_adaptive_lambda(mask.sum(1), self.args.length_adaptive_alpha)
            lam_value = self.args.lam if lam_value is None else lam_value
        advantages, returns = gae(rewards, values, mask, gamma=self.args.gamma, lam=lam, lam_value=lam_value)
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask, moments=self.moments(advantages, mask))
        output |= {"advantages": advantages, "returns": returns, "old_values": torch.where(mask, values, 0.0)}
        if self.num_generations == 1:  # of groups, which there are none of
            self._metrics[mode].pop("frac_reward_zero_std", None)
        self._show_advantages(advantages, mask)
        self._log_objective(mode, output, scores, ended, unscored, kl, mask)
        return output

    @torch.no_grad()
    def rollout_values(self, inputs: dict[str, Any]) -> Tensor:
        """Values [B, T] of a rollout's completion tokens, float32."""
        size = self._scored_at_once()
        self.value_model.eval()
        length = inputs["completion_ids"].shape[1]
        ids, attention = whole_sequences(inputs)
        parts = []
        for rows, mask in zip(ids.split(size), attention.split(size), strict=True):
            if isinstance(self.value_model, SharedHead):
                nothing = rows.new_full((rows.shape[0], length), IGNORE_INDEX)
                parts.append(self.value_model(self._score(self.model, rows, mask, nothing, with_hidden=True).hidden))
            else:
                with self.accelerator.autocast():
                    parts.append(self.value_model(rows, mask, length))
        return torch.cat(parts)

    def _scored_at_once(self) -> int:
        return self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size

    def _ended(self, output: dict[str, Any]) -> Tensor:
        """bool [B]: whether the last token of a completion is an end; where truncated ones are masked out, they did not."""
        mask = output["completion_mask"].bool()
        last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
        ids = output["completion_ids"].gather(1, last[:, None])[:, 0]
        return torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device)) & mask.any(1)

    def _kl(self, output: dict[str, Any], mask: Tensor) -> Tensor | None:
        """KL to the reference per token [B, T], 0 where masked; also sees to the log-probs that it is taken from."""
        if not self.args.kl_coef:
            return None
        name = "sampling_per_token_logps" if self.captures_rollout else "old_per_token_logps"
        if output.get(name) is None:
            with torch.no_grad():
                output[name], _, _ = self._get_per_token_logps_and_entropies(
                    self.model, *whole_sequences(output), mask.shape[1], batch_size=self._scored_at_once()
                )
        kl = kl_estimate(self.args.kl_estimator, output[name].float(), output["ref_per_token_logps"].float())
        return torch.where(mask, kl, 0.0)

    def moments(self, values: Tensor, mask: Tensor) -> Moments:
        """Over all processes, the same on each."""
        own = torch.stack([x.double() for x in masked_moments(values, mask)])
        every = self.accelerator.gather(own[None])
        merged = Moments(*every[0])
        for row in every[1:]:
            merged = merged.merge(Moments(*row))
        return merged

    def _show_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """The table of completions shows the mean advantage of a completion's tokens."""
        means = self.accelerator.gather(advantages.sum(1) / mask.sum(1).clamp(min=1)).tolist()
        shown = self._logs["advantages"]
        for _ in range(min(len(means), len(shown))):  # it keeps no more than a rollout's
            shown.pop()
        shown.extend(means)

    def _log_objective(
        self,
        mode: str,
        output: dict[str, Any],
        scores: Tensor,
        ended: Tensor,
        unscored: Tensor,
        kl: Tensor | None,
        mask: Tensor,
    ) -> None:
        scored = (~unscored).double()
        per_completion = torch.zeros_like(scored) if kl is None else kl.sum(1).double()
        n_scored, n_tokens = scored.sum(), mask.sum().double()
        sums = [n_scored, n_tokens, torch.full_like(n_scored, len(scored)), (scores * scored).sum(), (ended * scored).sum()]
        n, tokens, rows, score, eos, total_kl = self.accelerator.reduce(
            torch.stack([x.double() for x in (*sums, per_completion.sum())]), reduction="sum"
        ).tolist()
        error = output["old_values"].double() - output["returns"].double()
        returns, errors = self.moments(output["returns"], mask), self.moments(error, mask)
        metrics = self._metrics[mode]
        metrics["objective/unscored"].append(1 - n / rows)
        if n:
            coef = self.kl_controller.coef
            metrics["objective/scores"].append(score / n)
            metrics["objective/eos"].append(eos / n)
            metrics["objective/tokens"].append(tokens / n)
            if kl is not None:
                metrics["objective/kl"].append(total_kl / n)
                metrics["objective/kl_coef"].append(coef)
                metrics["objective/non_score_reward"].append(-coef * total_kl / n)
            metrics["objective/rlhf_reward"].append((score - coef * total_kl) / n)
            explained = float(explained_by_moments(errors, returns))
            if not math.isnan(explained):
                metrics["value/explained_variance"].append(explained)
            if kl is not None and mode == "train":  # moves the coefficient of the rollouts to come
                self.kl_controller.update(total_kl / n, int(rows))
