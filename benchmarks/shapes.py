"""The shapes every family is measured at: (N tokens, H hidden, V vocabulary)."""

from typing import NamedTuple


class Shape(NamedTuple):
    n: int
    h: int
    v: int


# One H200 fits these in bf16; a CPU gets shapes whose full logits still fit, so that naive torch can take part.
GPU_SHAPES = {"S1": Shape(8192, 1024, 151936), "S2": Shape(8192, 4096, 151936), "S3": Shape(16384, 2048, 128256)}
CPU_SHAPES = {"C1": Shape(1024, 256, 32768), "C2": Shape(1024, 1024, 32768), "C3": Shape(1024, 64, 151936)}


def shapes_for(device_type: str) -> dict[str, Shape]:
    return GPU_SHAPES if device_type == "cuda" else CPU_SHAPES
