"""The Hopper decoding kernel, run on the CPU, against float64: a process of its own, since Triton must not interpret."""

from __future__ import annotations

import sys

import torch
from gluon_on_cpu import OnCPU
from triton_cases import RingCase, poison, ring_failures

from power_retention.ops.triton import backend
from power_retention.ops.triton.hopper import decode, ring

bf16 = torch.bfloat16
CASES = {
    "width 64, a state ends with half a tile": RingCase((3, 1), (64, 64), 2, (1,) * 8, bf16, bf16),
    "two heads, folds of an odd size": RingCase((4, 2), (64, 64), 3, (1,) * 8, bf16, bf16),
    "width 128": RingCase((5, 1), (128, 128), 2, (1,) * 6, bf16, bf16),
    "no gates": RingCase((1, 1), (64, 64), 2, (1,) * 6, bf16, bf16, None),
    "taken back": RingCase((2, 1), (64, 64), 2, (1,) * 8, bf16, bf16, taken_back=2),
    "sixteen query heads a head": RingCase((16, 1), (64, 64), 2, (1,) * 6, bf16, bf16),
    "long ring, everything forgotten": RingCase((1, 1), (64, 64), 40, (1,) * 3, bf16, bf16, -300.0),
}


def main() -> int:
    OnCPU(decode, "decode_kernel")
    taken = []
    ring.covers = lambda *_: taken.append(True) or True
    ring._multiprocessors = lambda device: 3
    backend.TritonBackend.devices = ("cpu",)
    torch.empty, torch.empty_like = poison(torch.empty), poison(torch.empty_like)
    bad = 0
    for name, case in CASES.items():
        wrong = ring_failures(case, "cpu")
        bad += bool(wrong)
        print(f"{name}: {'; '.join(wrong) or 'right'}", flush=True)
    assert len(taken) == sum(len(case.pieces) for case in CASES.values()), "another kernel was checked"
    return bad


if __name__ == "__main__":
    sys.exit(main())
