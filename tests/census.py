"""Counting work: GEMM FLOPs of torch code under a dispatch mode, and what interpreted Triton kernels load, store and launch."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class GemmFlops(TorchDispatchMode):
    """Multiply-adds times two of every matrix product that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name in ("bmm", "baddbmm", "linear", "matmul"):
            raise AssertionError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that anything inside returns, those of `known` tensors left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.nbytes = 0
        self._known = {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._known:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


class KernelWork:
    """Elements that kernels loaded from and stored to named tensors, and how often each kernel was launched."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._ranges = {name: (x.data_ptr(), x.untyped_storage().nbytes()) for name, x in tensors.items()}
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def count(self, counter: Counter[str], pointers: np.ndarray, mask: np.ndarray) -> None:
        touched = pointers[mask] if pointers.shape == mask.shape else pointers[np.broadcast_to(mask, pointers.shape)]
        for name, (start, length) in self._ranges.items():
            inside = int(((touched >= start) & (touched < start + length)).sum())
            if inside:
                counter[name] += inside


@contextmanager
def counted_kernels(**tensors: Tensor) -> Iterator[KernelWork]:
    """Count inside the interpreter. Tensors are told apart by address, so their storages must not overlap."""
    from triton.runtime import interpreter

    work = KernelWork(tensors)
    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, grid.__call__

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        work.count(work.loaded, pointers.data, mask.data)
        return load(self, pointers, mask, *rest, **kwargs)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        work.count(work.stored, pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest, **kwargs)

    def counting_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        work.launches[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        patch.setattr(grid, "__call__", counting_launch)
        yield work


def linear_inputs(n: int, vocab: int, width: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, ids, gather_ids in float32."""
    g = torch.Generator().manual_seed(0)
    ids, gather_ids = torch.randint(0, vocab, (n,), generator=g), torch.randint(0, vocab, (n, k), generator=g)
    return torch.randn(n, width, generator=g), torch.randn(vocab, width, generator=g), ids, gather_ids
