"""Cases as frozen dataclasses drawn by Hypothesis; tensors are built from the seed, so that a failure replays and shrinks."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class ScoringCase:
    """Inputs of the scoring ops."""

    rows: int
    hidden_size: int
    vocab: int
    n_gather: int
    dtype: torch.dtype
    scale: float  # about the standard deviation of a logit
    layout: str  # contiguous | strided
    temperature: str  # one | cold | per_row
    ignored: str  # none | some | all
    bias: bool
    softcap: float | None
    logit_scale: float
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def hidden_and_head(self) -> tuple[Tensor, Tensor, Tensor | None]:
        g = self.generator()
        width = self.hidden_size * (2 if self.layout == "strided" else 1)
        hidden = torch.randn(self.rows, width, generator=g).to(self.dtype)[:, :: width // self.hidden_size]
        weight = torch.randn(self.hidden_size, self.vocab, generator=g) * self.scale / self.hidden_size**0.5
        weight = weight.to(self.dtype)
        weight = weight.t() if self.layout == "strided" else weight.t().contiguous()
        bias = torch.randn(self.vocab, generator=g).to(self.dtype) if self.bias else None
        return hidden, weight, bias

    def logits(self) -> Tensor:
        g = self.generator()
        width = self.vocab * (2 if self.layout == "strided" else 1)
        return (torch.randn(self.rows, width, generator=g) * self.scale).to(self.dtype)[:, :: width // self.vocab]

    def largest_logit(self) -> float:
        """Of the projection in float64, after scale, soft-cap and temperature."""
        hidden, weight, bias = (None if x is None else x.double() for x in self.hidden_and_head())
        assert hidden is not None
        assert weight is not None
        z = self.logit_scale * (hidden @ weight.t() + (0.0 if bias is None else bias))
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        temperature = self.row_temperature()
        z = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
        return z.abs().max().item() if z.numel() else 0.0

    def ids(self) -> Tensor:
        g = self.generator()
        ids = torch.randint(0, self.vocab, (self.rows,), generator=g)
        if self.rows:
            ids[-1] = self.vocab - 1  # the last column is in the last, partial tile
        if self.ignored == "some":
            ids[torch.rand(self.rows, generator=g) < 0.4] = IGNORE
        return torch.full_like(ids, IGNORE) if self.ignored == "all" else ids

    def gather_ids(self) -> Tensor | None:
        if not self.n_gather:
            return None
        ids = torch.randint(-1, self.vocab, (self.rows, self.n_gather), generator=self.generator())
        if self.n_gather > 1:
            ids[:, 1] = ids[:, 0]  # duplicates
        return ids

    def row_temperature(self) -> float | Tensor:
        if self.temperature == "per_row":
            return torch.rand(self.rows, generator=self.generator()) + 0.5
        return 1.0 if self.temperature == "one" else 0.1


def scoring_cases(*, dtypes: tuple[torch.dtype, ...] = (torch.float32,), max_rows: int = 33) -> st.SearchStrategy[ScoringCase]:
    return st.builds(
        ScoringCase,
        rows=st.sampled_from([0, 1, 2, 7, max_rows]),
        hidden_size=st.sampled_from([1, 8, 33]),
        vocab=st.sampled_from([2, 17, 100, 123]),
        n_gather=st.sampled_from([0, 1, 4]),
        dtype=st.sampled_from(dtypes),
        scale=st.sampled_from([0.1, 4.0, 30.0]),
        layout=st.sampled_from(["contiguous", "strided"]),
        temperature=st.sampled_from(["one", "cold", "per_row"]),
        ignored=st.sampled_from(["none", "some", "all"]),
        bias=st.booleans(),
        softcap=st.sampled_from([None, 5.0]),
        logit_scale=st.sampled_from([1.0, 0.25]),
        seed=st.integers(0, 2**20),
    )


def probabilities(vocab: int, rows: int, seed: int, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    """Two related float64 distributions [rows, vocab], as log-probs: a rollout policy and one some steps later."""
    g = torch.Generator().manual_seed(seed)
    mu = torch.randn(rows, vocab, generator=g, dtype=torch.float64) * sharpness
    pi = mu + torch.randn(rows, vocab, generator=g, dtype=torch.float64) * 0.7
    return torch.log_softmax(mu, -1), torch.log_softmax(pi, -1)
