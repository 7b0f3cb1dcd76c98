"""Batches for GAE, drawn by Hypothesis and built from a seed."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dppo_kernels import _ext

cpp = pytest.param("cpp", marks=pytest.mark.skipif(not _ext.CPU.loaded, reason=f"C++ extension: {_ext.CPU.reason}"))
op_backends = pytest.mark.parametrize("backend", [cpp, "torch"])
every_backend = pytest.mark.parametrize("backend", [cpp, "torch", "reference"])
# A matrix product may add in another order when it has other rows.
batch_invariant_backends = pytest.mark.parametrize("backend", [cpp, "reference"])


@dataclass(frozen=True)
class GaeCase:
    """Rewards, values and a mask, with NaN behind the mask."""

    rows: int
    steps: int
    mask: str  # full | left | right | holes | empty
    gamma: float
    lam: str  # zero | one | usual | rows
    lam_value: str  # none | one | usual | rows
    bootstrap: bool
    layout: str  # contiguous | strided
    seed: int

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """rewards, values, mask [B, T]."""
        g = torch.Generator().manual_seed(self.seed)
        every = 2 if self.layout == "strided" else 1
        width = self.steps * every
        rewards, values = (torch.randn(self.rows, width, generator=g) for _ in range(2))
        mask = torch.ones(self.rows, width, dtype=torch.bool)
        places, lengths = torch.arange(width), torch.randint(0, width + 1, (self.rows, 1), generator=g)
        if self.mask == "right":
            mask = places < lengths
        elif self.mask == "left":
            mask = places >= lengths
        elif self.mask == "holes":
            mask = torch.rand(self.rows, width, generator=g) < torch.rand(self.rows, 1, generator=g)
        elif self.mask == "empty":
            mask = torch.zeros_like(mask)
        poisoned = [torch.where(mask, x, torch.nan) for x in (rewards, values)]
        first, second = (x.to(dtype=dtype, device=device)[:, ::every] for x in poisoned)
        return first, second, mask.to(device)[:, ::every]

    def options(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
        g = torch.Generator().manual_seed(self.seed + 1)
        scalars = {"zero": 0.0, "one": 1, "usual": 0.95, "none": None}
        rows = [torch.rand(self.rows, generator=g).to(device, dtype) for _ in range(2)]
        bootstrap = torch.randn(self.rows, generator=g).to(device, dtype) if self.bootstrap else None
        lam = rows[0] if self.lam == "rows" else scalars[self.lam]
        lam_value = rows[1] if self.lam_value == "rows" else scalars[self.lam_value]
        return {"gamma": self.gamma, "lam": lam, "lam_value": lam_value, "bootstrap": bootstrap}


def gae_cases(*, steps: tuple[int, ...] = (0, 1, 2, 7, 64, 65, 150, 257), max_rows: int = 19) -> st.SearchStrategy[GaeCase]:
    return st.builds(
        GaeCase,
        rows=st.sampled_from([0, 1, 2, 8, max_rows]),
        steps=st.sampled_from(steps),
        mask=st.sampled_from(["full", "left", "right", "holes", "empty"]),
        gamma=st.sampled_from([1.0, 0.99, 0.5, 0.0]),
        lam=st.sampled_from(["zero", "one", "usual", "rows"]),
        lam_value=st.sampled_from(["none", "one", "usual", "rows"]),
        bootstrap=st.booleans(),
        layout=st.sampled_from(["contiguous", "strided"]),
        seed=st.integers(0, 2**20),
    )


def compacted(x: Tensor, mask: Tensor, row: int) -> Tensor:
    """[1, n]: what counts of one row."""
    return x[row][mask[row]][None]
