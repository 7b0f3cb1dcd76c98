"""The shapes every case is measured at: (N tokens, H hidden, V vocabulary)."""

from typing import NamedTuple


class Shape(NamedTuple):
    n: int
    h: int
    v: int


# One H200 fits these in bf16; a CPU gets shapes whose full logits still fit, so that naive torch can take part.
GPU_SHAPES = {"S1": Shape(8192, 1024, 151936), "S2": Shape(8192, 4096, 151936), "S3": Shape(16384, 2048, 128256)}
CPU_SHAPES = {"C1": Shape(1024, 256, 32768), "C2": Shape(1024, 1024, 32768), "C3": Shape(1024, 64, 151936)}
QUICK_SHAPES = {
    "cuda": {"S1": GPU_SHAPES["S1"]},
    "cpu": {"Q1": Shape(512, 256, 32768), "Q2": Shape(512, 64, 151936)},
}
SWEEPS = {
    "cuda": {
        **{f"V{v}": Shape(4096, 2048, v) for v in (32000, 64000, 128256, 256000)},
        **{f"N{n}": Shape(n, 2048, 151936) for n in (1024, 4096, 16384, 65536)},
    },
    "cpu": {
        **{f"V{v}": Shape(256, 128, v) for v in (8192, 32768, 131072)},
        **{f"N{n}": Shape(n, 128, 32768) for n in (128, 512, 2048)},
    },
}


def shapes_for(device_type: str, *, quick: bool = False, sweep: bool = False) -> dict[str, Shape]:
    """Shapes by name: the standard ones, one or two in their place, or (in addition) one vocabulary and one token sweep."""
    standard = GPU_SHAPES if device_type == "cuda" else CPU_SHAPES
    chosen = QUICK_SHAPES[device_type] if quick else standard
    return {**chosen, **(SWEEPS[device_type] if sweep else {})}
