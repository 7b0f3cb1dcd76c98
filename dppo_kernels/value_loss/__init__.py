"""Values and returns -> the (clipped) value loss, its gradient computed on the way."""

from dppo_kernels.value_loss.op import value_loss

__all__ = ["value_loss"]
