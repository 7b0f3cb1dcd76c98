"""The definitions agree with torch.distributions and with a brute-force top-K."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_kernels import token_logprobs, topk_logprobs
from tests.strategies import IGNORE, ScoringCase, scoring_cases


@given(scoring_cases(dtypes=(torch.float64,)))
def test_equals_categorical(case: ScoringCase) -> None:
    if not case.rows:
        return
    logits, ids, temperature = case.logits(), case.ids(), case.row_temperature()
    z = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    p, active = torch.distributions.Categorical(logits=z), ids != IGNORE
    out = token_logprobs(logits, ids, temperature=temperature, outputs=("logprobs", "entropy", "lse"), backend="reference")
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out.logprobs[active], p.log_prob(ids.clamp(min=0))[active], **close)
    torch.testing.assert_close(out.entropy[active], p.entropy()[active], **close)
    torch.testing.assert_close(out.lse[active], z.logsumexp(-1)[active], **close)
    assert not out.logprobs[~active].any()


def test_gradcheck() -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ids, gather_ids = torch.tensor([0, IGNORE, 5]), torch.tensor([[1, 1], [2, 3], [-1, 5]])

    def score(logits):
        outputs = ("logprobs", "lse", "entropy")
        out = token_logprobs(logits, ids, gather_ids=gather_ids, temperature=0.7, outputs=outputs, backend="reference")
        return out.logprobs, out.lse, out.entropy, out.gathered

    assert torch.autograd.gradcheck(score, (logits,))


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**20))
def test_topk_by_brute_force(k: int, sampled: int, seed: int) -> None:
    # Few distinct values, so that ties are the rule.
    logits = torch.randint(0, 3, (1, 6), generator=torch.Generator().manual_seed(seed)).double()
    out = topk_logprobs(logits, torch.tensor([sampled]), k, backend="reference")
    best = sorted(range(6), key=lambda i: (-logits[0, i].item(), i))[:k]
    logp = torch.log_softmax(logits, -1)[0]
    assert out.ids[0, :k].tolist() == best
    assert out.ids[0, k].item() == (-1 if sampled in best else sampled)
    assert out.valid[0].tolist() == [True] * k + [sampled not in best]
    torch.testing.assert_close(out.logprobs[0, :k], logp[best])
    assert out.logprobs[0, k].item() == (0.0 if sampled in best else logp[sampled].item())
    assert out.sampled_logprobs.item() == logp[sampled].item()
