"""Training of one discriminator: logistic loss, fresh examples every epoch, early stopping on the AUC of rows set apart."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from dppo_kernels.trainers.tabular.calibration import expected_calibration_error, fit_temperature

SCORING_BATCH = 512


@dataclass(frozen=True)
class Examples:
    """Inputs of a network by argument, each [N, ...], and what its logits should say."""

    inputs: dict[str, Tensor]
    labels: Tensor  # float32, shape of the logits: 1 real, 0 synthetic
    trained: Tensor  # bool, same shape: what the loss counts
    judged: Tensor  # bool, same shape: what AUC and calibration count

    def weights(self) -> Tensor:
        """By which both classes weigh the same in what is judged, so that a probability of 0.5 says nothing at any level."""
        judged = self.labels[self.judged].numpy()
        if len(np.unique(judged)) < 2:
            return torch.ones_like(self.labels)
        synthetic, real = compute_class_weight("balanced", classes=np.array([0.0, 1.0]), y=judged)
        return self.labels * (real - synthetic) + synthetic


@dataclass(frozen=True)
class TrainingOptions:
    """How a discriminator is trained: AdamW, and at most so many epochs of which `patience` bring nothing."""

    epochs: int = 40
    token_epochs: int = 8  # the one network that is slow
    patience: int = 15
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("epochs", "token_epochs", "patience", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        for name in ("learning_rate", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}")


def discriminator_bce(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of the logistic loss; labels are 1 for real and 0 for synthetic."""
    losses = binary_cross_entropy_with_logits(logits, labels, weights, reduction="none")
    return losses.mean() if weights is None else losses.sum() / weights.sum()


@torch.no_grad()
def predict(net: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, in batches."""
    net.eval()
    parts = [value.split(SCORING_BATCH) for value in inputs.values()]
    return torch.cat([net(**dict(zip(inputs, batch, strict=True))) for batch in zip(*parts, strict=True)])


def judge(net: nn.Module, examples: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits, labels, weights) of what is judged."""
    at = examples.judged
    logits, labels, weights = predict(net, examples.inputs)[at], examples.labels[at], examples.weights()[at]
    return logits.double().numpy(), labels.numpy(), weights.double().numpy()


def auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """How often a real one has the higher logit; 0.5 where all are of one kind, which says nothing."""
    return float(roc_auc_score(labels, logits)) if 0 < labels.mean() < 1 else 0.5


def train(
    net: nn.Module, draw: Callable[[int], Examples], tuning: Examples, seed: int, epochs: int, options: TrainingOptions
) -> int:
    """Train `net` on `draw(epoch)`, leave the weights of the best epoch in it, and return that epoch (0: as it was)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, options.learning_rate / 20)
    best, best_epoch, best_weights = auc(*judge(net, tuning)[:2]), 0, copy.deepcopy(net.state_dict())
    for epoch in range(1, epochs + 1):
        examples = draw(epoch)
        weights = examples.weights() * examples.trained
        net.train()
        for rows in torch.randperm(len(examples.labels), generator=generator).split(options.batch):
            if not weights[rows].any():
                continue
            logits = net(**{name: value[rows] for name, value in examples.inputs.items()})
            loss = discriminator_bce(logits, examples.labels[rows], weights[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        schedule.step()
        reached = auc(*judge(net, tuning)[:2])
        if reached > best:
            best, best_epoch, best_weights = reached, epoch, copy.deepcopy(net.state_dict())
        if epoch - best_epoch >= options.patience:
            break
    net.load_state_dict(best_weights)
    return best_epoch


def calibrate(net: nn.Module, tuning: Examples, held_out: Examples) -> dict[str, Any]:
    """Temperature from `tuning`; AUC and calibration error, with that temperature, of `held_out`."""
    temperature = fit_temperature(*judge(net, tuning))
    logits, labels, weights = judge(net, held_out)
    probabilities = torch.from_numpy(logits / temperature).sigmoid().numpy()
    return {
        "auc": auc(logits, labels),
        "ece": expected_calibration_error(probabilities, labels, weights),
        "temperature": temperature,
        "examples": len(labels),
    }
