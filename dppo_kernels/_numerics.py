"""Scalar formulas that lose digits when written the obvious way."""

import math

import torch
from torch import Tensor

# A float32 log-softmax returns 0 once 1 - p < 6e-8; the floor decides what 1 - p means for those tokens.
LOGPROB_CEILING = -1e-9


def log1mexp(logprobs: Tensor) -> Tensor:
    """``log(1 - exp(logprobs))`` to full precision at both ends; log-probs above -1e-9 count as -1e-9."""
    x = logprobs.clamp(max=LOGPROB_CEILING)
    near_one = torch.log(-torch.expm1(x))
    return torch.where(x > -math.log(2), near_one, torch.log1p(-torch.exp(x)))


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of statistics and outputs: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split_temperature(temperature: float | Tensor, n_rows: int, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """(one per row in `dtype` or None, the scalar): what an op schema, which has no unions, can take."""
    if isinstance(temperature, Tensor):
        return temperature.reshape(-1).to(dtype).expand(n_rows).contiguous(), 1.0
    return None, float(temperature)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that `torch.autocast` asks for on this device right now, if it is on."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def compute_dtype_of(hidden: Tensor) -> torch.dtype:
    """What hidden states and their head are rounded to before they are multiplied: autocast's dtype, or their own."""
    autocast = autocast_dtype(hidden.device)
    return hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast
