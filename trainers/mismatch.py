"""Watching how far the engine that samples and the model that trains are apart while their weights are the same."""

from collections.abc import Mapping
from typing import Any

from accelerate.logging import get_logger

from dppo_kernels import Stat
from dppo_kernels.trainers.metrics import Reduced, StatLoggingMixin

logger = get_logger(__name__)

MISMATCH_ACTIONS = ("warn", "stop")

# Logged name -> (stat, how it is read).
MISMATCH_METRICS = {
    "engine_mismatch/prob_gap_mean": ("fresh_prob_gap", "mean"),
    "engine_mismatch/prob_gap_max": ("fresh_prob_gap", "max"),
    "engine_mismatch/tv": ("fresh_tv", "mean"),
    "engine_mismatch/kl": ("fresh_kl", "mean"),
}


def fresh_stats(stats: Mapping[str, Stat], kind: str) -> dict[str, Stat]:
    """The mismatch, from the loss's stats on the weights that wrote the rollout. mu is the sampler, pi the trainer.

    ``fresh_prob_gap``: |mu - pi| of the sampled token. ``fresh_tv``: the configured divergence where it is a TV, else binary
    TV, which is the gap. ``fresh_kl``: the configured divergence where it is a KL, else the k1 estimate of KL(mu || pi): the
    mean of log mu - log pi over sampled tokens, which may be negative.
    """
    return {
        "fresh_prob_gap": stats["prob_gap"],
        "fresh_tv": stats["divergence" if kind.endswith("tv") else "prob_gap"],
        "fresh_kl": stats["divergence" if kind.endswith("kl") else "anchor_kl"],
    }


class MismatchMonitorMixin(StatLoggingMixin):
    """Warns or stops when the logged mean of ``fresh_prob_gap`` exceeds `args.mismatch_threshold`.

    It sees the tokens that the loss scores: without `score_inactive`, none of groups whose rewards are all equal.
    A warning comes when the threshold is crossed, not again until the mean has been below it. Means are over all processes, so
    all of them stop together.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._mismatched = {"train": False, "eval": False}
        super().__init__(*args, **kwargs)

    def inspect_logged(self, mode: str, reduced: Mapping[str, Reduced]) -> None:
        super().inspect_logged(mode, reduced)
        threshold = self.args.mismatch_threshold
        if threshold is None or "fresh_prob_gap" not in reduced:
            return
        exceeded = not reduced["fresh_prob_gap"].mean <= threshold  # NaN exceeds
        if exceeded and self.args.mismatch_action == "stop":
            raise RuntimeError(self._explain(mode, reduced))
        if exceeded and not self._mismatched[mode]:
            logger.warning(self._explain(mode, reduced))
        self._mismatched[mode] = exceeded

    def _explain(self, mode: str, reduced: Mapping[str, Reduced]) -> str:
        gap = reduced["fresh_prob_gap"]
        figures = ", ".join(f"{name[6:]} {reduced[name].mean:.3g}" for name in ("fresh_tv", "fresh_kl") if name in reduced)
        return (
            f"step {self.state.global_step} ({mode}): on unchanged weights, sampler and trainer differ by {gap.mean:.3g} in "
            f"the mean probability of a sampled token (largest {gap.max:.3g}; {figures}), more than "
            f"`mismatch_threshold`={self.args.mismatch_threshold:g}: part of the trust region is spent on the difference of "
            "two engines. Likely causes: the engine samples at another temperature; top-p, top-k or a penalty renormalises its "
            "log-probs; its weights are stale because a sync failed or was skipped; dropout is on in the trainer; the engine "
            "computes in bf16 or fp16 and the trainer in fp32; a vLLM server without `--logprobs-mode processed_logprobs`. "
            "`mismatch_threshold=None` turns this check off."
        )
