"""Backend choice: argument, environment, reasons."""

import pytest
import torch

from dppo_kernels import _backend, token_logprobs


def test_auto_takes_the_first_implementation(monkeypatch) -> None:
    monkeypatch.delenv("DPPO_KERNELS_BACKEND", raising=False)
    for op, names in _backend.IMPLEMENTATIONS.items():
        assert _backend.resolve(op, None) == _backend.resolve(op, "auto") == names[0]


def test_environment_is_overruled_by_the_argument(monkeypatch) -> None:
    monkeypatch.setenv("DPPO_KERNELS_BACKEND", "reference")
    assert _backend.resolve("linear_logprobs", None) == "reference"
    assert _backend.resolve("linear_logprobs", "torch") == "torch"
    monkeypatch.setenv("DPPO_KERNELS_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"`DPPO_KERNELS_BACKEND` must be one of 'auto'.*got 'fastest'"):
        _backend.resolve("linear_logprobs", None)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_named_backend_that_cannot_serve_says_why(name: str, monkeypatch) -> None:
    with pytest.raises(ValueError, match=f"backend='{name}' cannot serve token_logprobs: .*this version has no"):
        token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend=name)
    monkeypatch.setenv("DPPO_KERNELS_BACKEND", name)
    with pytest.raises(ValueError, match=f"DPPO_KERNELS_BACKEND='{name}' cannot serve"):
        token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))


def test_explain_names_the_choice_and_its_reason(monkeypatch) -> None:
    monkeypatch.delenv("DPPO_KERNELS_BACKEND", raising=False)
    assert _backend.explain("topk_logprobs").startswith("topk_logprobs runs on 'torch' (the best one implemented)")
    assert "named by backend='reference'" in _backend.explain("topk_logprobs", "reference")


def test_status_has_a_reason_for_every_backend() -> None:
    status = _backend.status()
    assert set(status) == set(_backend.BACKENDS) - {"auto"}
    assert all(reason for _, reason in status.values())
