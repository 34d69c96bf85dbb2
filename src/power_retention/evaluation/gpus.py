"""GPUs by name: what their makers state, and what renting one costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, as its maker states it; the price is what an hour is rented for, about.

    Attributes:
        memory_gb: in 10⁹ bytes.
        bandwidth_tb_s: of its memory, in 10¹² bytes a second.
        tflops: dense bfloat16 matrix products, in 10¹² operations a second.
        dollars_per_hour: of renting one.
    """

    name: str
    memory_gb: float
    bandwidth_tb_s: float
    tflops: float
    dollars_per_hour: float


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("A100-40", 40, 1.56, 312, 1.30),
        Gpu("A100", 80, 2.04, 312, 1.60),
        Gpu("L40S", 48, 0.86, 362, 0.90),
        Gpu("RTX4090", 24, 1.01, 165, 0.40),
        Gpu("H100", 80, 3.35, 989, 2.10),
        Gpu("H200", 141, 4.8, 989, 2.60),
        Gpu("B200", 180, 8.0, 2250, 4.50),
        Gpu("MI300X", 192, 5.3, 1307, 2.20),
    )
}
"""GPUs by their lower-case name."""
