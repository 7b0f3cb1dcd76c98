"""Hidden states and an lm_head to a policy loss, its gradient computed on the way."""

from dppo_kernels.linear_policy_loss.op import PolicyAux, explain_linear_policy_loss, linear_policy_loss

__all__ = ["PolicyAux", "explain_linear_policy_loss", "linear_policy_loss"]
