"""Backend choice: argument, environment, reasons."""

import pytest
import torch

from dppo_kernels import _backend, _ext, token_logprobs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch) -> None:
    monkeypatch.delenv("DPPO_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(_backend, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(_backend, "_INTERPRETED", False)


@pytest.mark.parametrize("op", ["linear_logprobs", "token_logprobs"])
def test_auto_takes_triton_on_cuda_and_torch_elsewhere(op: str, monkeypatch) -> None:
    assert _backend.resolve(op, None, CUDA, torch.bfloat16) == _backend.resolve(op, "auto", CUDA, torch.float32) == "triton"
    assert _backend.resolve(op, None, CUDA, torch.float64) == "torch"
    assert _backend.resolve(op, None, CPU, torch.float32) == "torch"
    monkeypatch.setattr(_backend, "_INTERPRETED", True)
    assert _backend.resolve(op, None, CPU, torch.float32) == "torch"  # the interpreter has to be asked for
    assert _backend.resolve(op, "triton", CPU, torch.float32) == "triton"
    monkeypatch.setattr(_backend, "_TRITON_INSTALLED", False)
    assert _backend.resolve(op, None, CUDA, torch.bfloat16) == "torch"


def test_environment_is_overruled_by_the_argument(monkeypatch) -> None:
    monkeypatch.setenv("DPPO_KERNELS_BACKEND", "reference")
    assert _backend.resolve("linear_logprobs", None, CPU, torch.float32) == "reference"
    assert _backend.resolve("linear_logprobs", "torch", CPU, torch.float32) == "torch"
    monkeypatch.setenv("DPPO_KERNELS_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"`DPPO_KERNELS_BACKEND` must be one of 'auto'.*got 'fastest'"):
        _backend.resolve("linear_logprobs", None, CPU, torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("triton", torch.float32, "its kernels need a CUDA device, these tensors are on cpu"),
        ("cuda", torch.float32, "this version has no cuda implementation of it"),
    ],
)
def test_a_named_backend_that_cannot_serve_says_why(name: str, dtype: torch.dtype, reason: str, monkeypatch) -> None:
    arguments = torch.zeros(1, 2, dtype=dtype), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"backend='{name}' cannot serve token_logprobs: {reason}"):
        token_logprobs(*arguments, backend=name)
    monkeypatch.setenv("DPPO_KERNELS_BACKEND", name)
    with pytest.raises(ValueError, match=f"DPPO_KERNELS_BACKEND='{name}' cannot serve"):
        token_logprobs(*arguments)


def test_triton_refuses_float64_and_its_own_absence(monkeypatch) -> None:
    with pytest.raises(ValueError, match="its statistics are float32, these tensors are float64"):
        _backend.resolve("linear_logprobs", "triton", CUDA, torch.float64)
    monkeypatch.setattr(_backend, "_TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        _backend.resolve("linear_logprobs", "triton", CUDA, torch.float32)
    assert _backend.status()["triton"] == (False, "Triton is not installed")


def test_explain_names_the_choice_and_its_reason() -> None:
    assert _backend.explain("linear_logprobs", device=CPU).startswith("linear_logprobs runs on 'torch' (the best one for cpu")
    assert _backend.explain("linear_logprobs", device=CUDA).startswith("linear_logprobs runs on 'triton'")
    assert "named by backend='reference'" in _backend.explain("topk_logprobs", "reference")


def test_status_has_a_reason_for_every_backend() -> None:
    status = _backend.status()
    assert set(status) == set(_backend.BACKENDS) - {"auto"}
    assert all(reason for _, reason in status.values())


@pytest.mark.parametrize(("name", "device", "other"), [("cpp", CPU, CUDA), ("cuda", CUDA, CPU)])
def test_extensions_serve_their_device_where_they_are_built(name: str, device, other, monkeypatch) -> None:
    attribute = "CPU" if name == "cpp" else "CUDA"
    monkeypatch.setattr(_ext, attribute, _ext.Extension(True, "_C.abi3.so"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert _backend.resolve("topk_logprobs", None, device, dtype) == name
    assert _backend.resolve("topk_logprobs", None, device, torch.float64) == "torch"
    with pytest.raises(ValueError, match=f"it serves {device.type} tensors, these are on {other.type}"):
        _backend.resolve("topk_logprobs", name, other, torch.float32)
    with pytest.raises(ValueError, match="it serves float32, bfloat16 and float16, these tensors are float64"):
        _backend.resolve("topk_logprobs", name, device, torch.float64)
    monkeypatch.setattr(_ext, attribute, _ext.Extension(False, "not built: torch was not found"))
    assert _backend.resolve("topk_logprobs", None, device, torch.float32) == "torch"
    assert _backend.status()[name] == (False, "not built: torch was not found")
    with pytest.raises(ValueError, match=f"backend='{name}' cannot serve topk_logprobs: not built: torch was not found"):
        _backend.resolve("topk_logprobs", name, device, torch.float32)


def test_a_build_that_lacks_an_op_serves_the_others(monkeypatch) -> None:
    monkeypatch.setattr(_ext, "CPU", _ext.Extension(True, "_C.abi3.so", ("gae", "whiten")))
    assert _backend.resolve("topk_logprobs", None, CPU, torch.float32) == "cpp"
    assert _backend.resolve("gae", None, CPU, torch.float32) == "torch"
    assert _backend.status()["cpp"] == (True, "C++ on CPU tensors (_C.abi3.so, an older build without gae, whiten)")
    with pytest.raises(ValueError, match=r"cannot serve gae: _C\.abi3\.so is of an older build without it: build it again"):
        _backend.resolve("gae", "cpp", CPU, torch.float32)


def test_dtypes_of_the_extension_by_op(monkeypatch) -> None:
    monkeypatch.setattr(_ext, "CPU", _ext.Extension(True, "_C.abi3.so"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert _backend.resolve("gae", None, CPU, dtype) == "cpp"
    with pytest.raises(ValueError, match=r"it serves float32, bfloat16, float16 and float64, these tensors are float8_e4m3fn"):
        _backend.resolve("gae", "cpp", CPU, torch.float8_e4m3fn)


def test_the_cuda_extension_leaves_older_devices_to_torch(monkeypatch) -> None:
    monkeypatch.setattr(_ext, "CUDA", _ext.Extension(True, "_C_cuda.abi3.so"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _backend.status()["cuda"] == (False, "no CUDA device (_C_cuda.abi3.so is loaded)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert _backend.resolve("topk_logprobs", None, CUDA, torch.float16) == "torch"
    with pytest.raises(ValueError, match="it is compiled for sm_80 and later"):
        _backend.resolve("topk_logprobs", "cuda", CUDA, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert _backend.status()["cuda"] == (True, "CUDA C++ on CUDA tensors (_C_cuda.abi3.so)")
    assert _backend.resolve("topk_logprobs", None, CUDA, torch.float16) == "cuda"
