"""Host side of the Triton kernels: which device they run on, how matrices are handed to them, how many programs to start."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton reads it when kernels are decorated, so it cannot change later.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

Capability = tuple[int, int]


def capability(device: torch.device) -> Capability | None:
    """Compute capability; None in the interpreter, whatever it imitates."""
    return None if INTERPRET else torch.cuda.get_device_capability(device)


def launch_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' own."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def program_count(device: torch.device) -> int:
    """Programs of a persistent grid."""
    return 4 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


def descriptor_obstacle(device: torch.device, matrix: Tensor) -> str | None:
    """Why `matrix` cannot be read through a tensor descriptor (TMA), if it cannot."""
    if not INTERPRET and torch.cuda.get_device_capability(device) < (9, 0):
        return "the device has no tensor memory accelerator (needs sm_90)"
    if matrix.stride(1) != 1:
        return f"rows are not contiguous (strides {matrix.stride()})"
    if matrix.stride(0) * matrix.element_size() % 16 or matrix.data_ptr() % 16:
        return f"rows do not start at multiples of 16 bytes (strides {matrix.stride()}, {matrix.element_size()} bytes each)"
    if 0 in matrix.shape:
        return "it is empty"
    return None


def can_describe(device: torch.device, *matrices: Tensor, wanted: bool | None = None) -> bool:
    """Whether kernels read these matrices through descriptors: all of them or none.

    Raises:
        ValueError: `wanted` is True and a matrix cannot be described.
    """
    obstacle = next((reason for matrix in matrices if (reason := descriptor_obstacle(device, matrix)) is not None), None)
    if wanted and obstacle is not None:
        raise ValueError(f"tensor descriptors are not possible: {obstacle}")
    return obstacle is None and (wanted if wanted is not None else not INTERPRET)


def operand(matrix: Tensor, tile: tuple[int, int], described: bool) -> object:
    """What a kernel takes for `matrix`, of which it loads tiles of this shape."""
    return TensorDescriptor.from_tensor(matrix, list(tile)) if described else matrix
