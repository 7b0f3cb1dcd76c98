"""The definition agrees with first principles: full logits, float64, gradcheck."""

import torch
from hypothesis import given

from dppo_kernels import linear_logprobs
from dppo_kernels.linear_logprobs import reference
from tests.strategies import IGNORE, ScoringCase, scoring_cases

OUTPUTS = ("logprobs", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@given(scoring_cases(dtypes=(torch.float64,)))
def test_equals_full_logits(case: ScoringCase) -> None:
    hidden, weight, bias = case.hidden_and_head()
    ids, gather_ids, temperature = case.ids(), case.gather_ids(), case.row_temperature()
    z = hidden @ weight.t()
    z = case.logit_scale * (z if bias is None else z + bias)
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    p = torch.distributions.Categorical(logits=z) if case.rows else None
    out = linear_logprobs(
        hidden,
        weight,
        ids,
        bias=bias,
        gather_ids=gather_ids,
        temperature=temperature,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        outputs=OUTPUTS,
        backend="reference",
    )
    assert out.logprobs is not None
    assert out.entropy is not None
    assert out.logprobs.shape == ids.shape
    if p is None:
        return
    active = ids != IGNORE
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out.logprobs[active], p.log_prob(ids.clamp(min=0))[active], **close)
    torch.testing.assert_close(out.entropy[active], p.entropy()[active], **close)
    torch.testing.assert_close(out.lse[active], z.logsumexp(-1)[active], **close)
    torch.testing.assert_close(out.log_sum_sq_probs[active], p.probs.square().sum(-1).log()[active], **close)
    torch.testing.assert_close(out.mean_logits[active], z.mean(-1)[active], **close)
    assert torch.equal(out.is_top1[active], (z.argmax(-1) == ids)[active])
    for value in out:
        if value is not None:
            assert not value[~active].any()
    if gather_ids is not None:
        expected = torch.log_softmax(z, -1).gather(1, gather_ids.clamp(min=0)).masked_fill(gather_ids < 0, 0.0)
        torch.testing.assert_close(out.gathered[active], expected[active], **close)


def test_chunks_do_not_matter(monkeypatch) -> None:
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 30, (9,))
    results = []
    for rows in (100, 2):
        monkeypatch.setattr(reference, "pick_row_chunk", lambda vocab, rows=rows: rows)
        out = linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"), backend="reference")
        grads = torch.autograd.grad(out.logprobs.sum() + out.entropy.square().sum(), (hidden, weight))
        results.append((out.logprobs, out.entropy, *grads))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ids, gather_ids = torch.tensor([0, IGNORE, 6]), torch.tensor([[1, 1], [2, 3], [-1, 6]])

    def score(hidden, weight, bias):
        out = linear_logprobs(
            hidden,
            weight,
            ids,
            bias=bias,
            gather_ids=gather_ids,
            softcap=3.0,
            temperature=0.7,
            outputs=("logprobs", "lse", "entropy"),
            backend="reference",
        )
        return out.logprobs, out.lse, out.entropy, out.gathered

    assert torch.autograd.gradcheck(score, (hidden, weight, bias))
