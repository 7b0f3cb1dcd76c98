"""Preference losses of pairs and their derivatives in closed form, on float64 tensors of one number per pair.

With h = log pi(y|x) - log pi_ref(y|x) of the chosen (w) and the rejected (l) sequence, s = f(h) the score under an f-divergence
(h itself for the reverse KL), d = s_w - s_l, x = beta d, a = beta h_w, b = beta h_l, e = label_smoothing, |y| a length:

    sigmoid           -log sig(x)                        sigmoid_smoothed  -(1 - e) log sig(x) - e log sig(-x)
    hinge             max(0, 1 - x)                      robust            [-(1 - e) log sig(x) + e log sig(-x)] / (1 - 2e)
    exo_pair          sig(x) [log sig(x) - log(1 - e)] + sig(-x) [log sig(-x) - log e]
    discopop          (1 - g)(-log sig(x)) + g exp(-x),  g = sig(x / tau)
    ipo               (s_w / |w| - s_l / |l| - 1 / (2 beta))^2;   ipo_sum without the lengths
    sigmoid_norm      -log sig(beta (s_w / |w| - s_l / |l|))
    nca_pair          -log sig(a) - log sig(-a) / 2 - log sig(-b) / 2
    bco_pair          -log sig(a) - log sig(-b)          sppo_hard         (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2
    apo_zero          1 - sig(a) + sig(b)                apo_down          sig(a) + 1 - sig(a - b)
    aot               sigmoid_smoothed of beta (sort(log pi_w - log pi_l) - sort(log ref_w - log ref_l))
    aot_unpaired      sigmoid_smoothed of beta (sort(h_w) - sort(h_l))
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dppo_kernels.preference_spec import PreferenceSpec

# exp of what is above it is not representable in 32 bits: scores are constant there, or one far pair would be a NaN. TRL clamps
# the alpha-divergence's.
LARGEST_EXPONENT = 80.0


class Pairs(NamedTuple):
    """Log-probs of the sequences of P pairs, summed over tokens, and their numbers of tokens; [P] each, float64."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor | None = None  # at least 1
    rejected_lengths: Tensor | None = None

    def scores(self, spec: PreferenceSpec) -> tuple[Tensor, Tensor]:
        """``f(h)`` of chosen and rejected."""
        return score(self.chosen - self.ref_chosen, spec), score(self.rejected - self.ref_rejected, spec)

    def lengths(self) -> tuple[Tensor, Tensor]:
        assert self.chosen_lengths is not None
        assert self.rejected_lengths is not None
        return self.chosen_lengths, self.rejected_lengths


Slopes = tuple[Tensor, Tensor]  # of the loss by the scores of chosen and rejected


def score(h: Tensor, spec: PreferenceSpec) -> Tensor:
    """The derivative of the f-divergence at ``exp(h)``: what DPO rewards are made of."""
    kind, alpha = spec.f_divergence_type, spec.f_alpha_divergence_coef
    if kind == "forward_kl":
        return -torch.expm1((-h).clamp(max=LARGEST_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(h)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * h).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)
    return h


def score_slope(h: Tensor, spec: PreferenceSpec) -> Tensor:
    """``f'(h)`` of `score`."""
    kind, alpha = spec.f_divergence_type, spec.f_alpha_divergence_coef
    if kind == "js_divergence":
        return torch.sigmoid(-h)
    if kind == "forward_kl":
        exponent = -h
    elif kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        exponent = (alpha - 1) * h
    else:
        return torch.ones_like(h)
    return torch.where(exponent <= LARGEST_EXPONENT, exponent.clamp(max=LARGEST_EXPONENT).exp(), 0.0)


def pair_losses(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """Weighted sum of the losses of each pair [P], without "sft"; differentiable."""
    scores = pairs.scores(spec)
    total = torch.zeros_like(pairs.chosen)
    for name, weight in spec.weighted_losses.items():
        if name != "sft":
            total = total + weight * FORMULAS[name].value(pairs, *scores, spec)
    return total


@torch.no_grad()
def pair_slopes(pairs: Pairs, pair_weights: Tensor | float, spec: PreferenceSpec) -> Slopes:
    """Derivative of ``sum(pair_weights * pair_losses)`` by the log-probs of chosen and rejected, [P] each."""
    scores = pairs.scores(spec)
    chosen, rejected = torch.zeros_like(pairs.chosen), torch.zeros_like(pairs.chosen)
    for name, weight in spec.weighted_losses.items():
        if name != "sft":
            on_chosen, on_rejected = FORMULAS[name].slopes(pairs, *scores, spec)
            chosen += weight * on_chosen
            rejected += weight * on_rejected
    chosen *= pair_weights * score_slope(pairs.chosen - pairs.ref_chosen, spec)
    rejected *= pair_weights * score_slope(pairs.rejected - pairs.ref_rejected, spec)
    return chosen, rejected


class Formula(NamedTuple):
    """A loss of (pairs, chosen scores, rejected scores, spec): its value [P] and its slopes."""

    value: Callable[[Pairs, Tensor, Tensor, PreferenceSpec], Tensor]
    slopes: Callable[[Pairs, Tensor, Tensor, PreferenceSpec], Slopes]


Curve = Callable[[Tensor, PreferenceSpec], Tensor]


def _of_margin(value: Curve, slope: Curve) -> Formula:
    """Of ``x = beta (s_w - s_l)``."""

    def slopes(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Slopes:
        on_margin = spec.beta * slope(spec.beta * (w - r), spec)
        return on_margin, -on_margin

    return Formula(lambda _, w, r, spec: value(spec.beta * (w - r), spec), slopes)


def _of_mean_margin(value: Curve, slope: Curve) -> Formula:
    """Of ``s_w / |w| - s_l / |l|``."""

    def margin(pairs: Pairs, w: Tensor, r: Tensor) -> Tensor:
        chosen, rejected = pairs.lengths()
        return w / chosen - r / rejected

    def slopes(pairs: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Slopes:
        chosen, rejected = pairs.lengths()
        on_margin = slope(margin(pairs, w, r), spec)
        return on_margin / chosen, -on_margin / rejected

    return Formula(lambda pairs, w, r, spec: value(margin(pairs, w, r), spec), slopes)


def _sigmoid(x: Tensor, spec: PreferenceSpec) -> Tensor:
    return -logsigmoid(x)


def _sigmoid_slope(x: Tensor, spec: PreferenceSpec) -> Tensor:
    return -torch.sigmoid(-x)


def _smoothed(x: Tensor, spec: PreferenceSpec) -> Tensor:
    return -(1 - spec.label_smoothing) * logsigmoid(x) - spec.label_smoothing * logsigmoid(-x)


def _smoothed_slope(x: Tensor, spec: PreferenceSpec) -> Tensor:
    return spec.label_smoothing * torch.sigmoid(x) - (1 - spec.label_smoothing) * torch.sigmoid(-x)


def _robust(x: Tensor, spec: PreferenceSpec) -> Tensor:
    e = spec.label_smoothing
    return (e * logsigmoid(-x) - (1 - e) * logsigmoid(x)) / (1 - 2 * e)


def _robust_slope(x: Tensor, spec: PreferenceSpec) -> Tensor:
    e = spec.label_smoothing
    return -((1 - e) * torch.sigmoid(-x) + e * torch.sigmoid(x)) / (1 - 2 * e)


def _hinge(x: Tensor, spec: PreferenceSpec) -> Tensor:
    return torch.relu(1 - x)


def _hinge_slope(x: Tensor, spec: PreferenceSpec) -> Tensor:
    return -(x < 1).to(x.dtype)


def _exo(x: Tensor, spec: PreferenceSpec) -> Tensor:
    e = spec.label_smoothing
    chosen = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-e))
    return chosen + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(e))


def _exo_slope(x: Tensor, spec: PreferenceSpec) -> Tensor:
    e = spec.label_smoothing
    return torch.sigmoid(x) * torch.sigmoid(-x) * (x - math.log1p(-e) + math.log(e))


def _discopop(x: Tensor, spec: PreferenceSpec) -> Tensor:
    # g exp(-x) as one exponential: where exp(-x) overflows, g is smaller still.
    tempered = x / spec.discopop_tau
    return -torch.sigmoid(-tempered) * logsigmoid(x) + (logsigmoid(tempered) - x).exp()


def _discopop_slope(x: Tensor, spec: PreferenceSpec) -> Tensor:
    tempered = x / spec.discopop_tau
    rest = torch.sigmoid(-tempered)  # 1 - g
    g_slope = torch.sigmoid(tempered) * rest / spec.discopop_tau
    exponential = (logsigmoid(tempered) - x).exp()  # g exp(-x)
    return g_slope * logsigmoid(x) - rest * torch.sigmoid(-x) + exponential * (rest / spec.discopop_tau - 1)


def _squared_gap(margin: Tensor, spec: PreferenceSpec) -> Tensor:
    return (margin - 1 / (2 * spec.beta)).square()


def _squared_gap_slope(margin: Tensor, spec: PreferenceSpec) -> Tensor:
    return 2 * (margin - 1 / (2 * spec.beta))


def _nca(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Tensor:
    a, b = spec.beta * w, spec.beta * r
    return -logsigmoid(a) - (logsigmoid(-a) + logsigmoid(-b)) / 2


def _nca_slopes(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Slopes:
    a, b = spec.beta * w, spec.beta * r
    return spec.beta * (torch.sigmoid(a) / 2 - torch.sigmoid(-a)), spec.beta * torch.sigmoid(b) / 2


def _bco(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Tensor:
    return -logsigmoid(spec.beta * w) - logsigmoid(-spec.beta * r)


def _bco_slopes(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Slopes:
    return -spec.beta * torch.sigmoid(-spec.beta * w), spec.beta * torch.sigmoid(spec.beta * r)


def _sppo(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Tensor:
    return (w - 1 / (2 * spec.beta)).square() + (r + 1 / (2 * spec.beta)).square()


def _sppo_slopes(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Slopes:
    return 2 * (w - 1 / (2 * spec.beta)), 2 * (r + 1 / (2 * spec.beta))


def _bell(x: Tensor) -> Tensor:
    """Derivative of the sigmoid."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _apo_zero(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Tensor:
    return torch.sigmoid(-spec.beta * w) + torch.sigmoid(spec.beta * r)


def _apo_zero_slopes(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Slopes:
    return -spec.beta * _bell(spec.beta * w), spec.beta * _bell(spec.beta * r)


def _apo_down(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Tensor:
    return torch.sigmoid(spec.beta * w) + torch.sigmoid(-spec.beta * (w - r))


def _apo_down_slopes(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Slopes:
    on_margin = spec.beta * _bell(spec.beta * (w - r))
    return spec.beta * _bell(spec.beta * w) - on_margin, on_margin


def _aot(pairs: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Tensor:
    gap = (pairs.chosen - pairs.rejected).sort().values - (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return _smoothed(spec.beta * gap, spec)


def _aot_slopes(pairs: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Slopes:
    margins = (pairs.chosen - pairs.rejected).sort()
    gap = margins.values - (pairs.ref_chosen - pairs.ref_rejected).sort().values
    on_margin = torch.empty_like(gap).scatter_(0, margins.indices, spec.beta * _smoothed_slope(spec.beta * gap, spec))
    return on_margin, -on_margin


def _aot_unpaired(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Tensor:
    return _smoothed(spec.beta * (w.sort().values - r.sort().values), spec)


def _aot_unpaired_slopes(_: Pairs, w: Tensor, r: Tensor, spec: PreferenceSpec) -> Slopes:
    chosen, rejected = w.sort(), r.sort()
    on_gap = spec.beta * _smoothed_slope(spec.beta * (chosen.values - rejected.values), spec)
    on_chosen = torch.empty_like(on_gap).scatter_(0, chosen.indices, on_gap)
    return on_chosen, torch.empty_like(on_gap).scatter_(0, rejected.indices, -on_gap)


FORMULAS = {
    "sigmoid": _of_margin(_sigmoid, _sigmoid_slope),
    "sigmoid_smoothed": _of_margin(_smoothed, _smoothed_slope),
    "robust": _of_margin(_robust, _robust_slope),
    "hinge": _of_margin(_hinge, _hinge_slope),
    "exo_pair": _of_margin(_exo, _exo_slope),
    "discopop": _of_margin(_discopop, _discopop_slope),
    "ipo": _of_mean_margin(_squared_gap, _squared_gap_slope),
    "sigmoid_norm": _of_mean_margin(
        lambda margin, spec: _sigmoid(spec.beta * margin, spec),
        lambda margin, spec: spec.beta * _sigmoid_slope(spec.beta * margin, spec),
    ),
    "ipo_sum": _of_margin(
        lambda x, spec: _squared_gap(x / spec.beta, spec), lambda x, spec: _squared_gap_slope(x / spec.beta, spec) / spec.beta
    ),
    "nca_pair": Formula(_nca, _nca_slopes),
    "bco_pair": Formula(_bco, _bco_slopes),
    "sppo_hard": Formula(_sppo, _sppo_slopes),
    "apo_zero": Formula(_apo_zero, _apo_zero_slopes),
    "apo_down": Formula(_apo_down, _apo_down_slopes),
    "aot": Formula(_aot, _aot_slopes),
    "aot_unpaired": Formula(_aot_unpaired, _aot_unpaired_slopes),
}
