"""The divergences that a student is distilled by, as one normal form."""

from typing import NamedTuple

from dppo_kernels import _checks

DISTILL_KINDS = ("forward_kl", "reverse_kl", "jsd", "tv")


class Kind(NamedTuple):
    """A divergence between teacher p and student q; `beta` matters to "jsd" alone, and is inside of (0, 1) there."""

    name: str
    beta: float


def resolve_kind(kind: str, beta: float) -> Kind:
    """Checked arguments in normal form: GKD defines "jsd" at 0 and 1 as the two KLs, of which its formula is no limit.

    Raises:
        TypeError, ValueError: an unknown kind, a `beta` outside of [0, 1].
    """
    _checks.check_choice("kind", kind, DISTILL_KINDS)
    _checks.check_fraction("beta", beta)
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    return Kind(kind, float(beta) if kind == "jsd" else 0.0)
