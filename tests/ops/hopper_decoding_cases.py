"""The Hopper decoding kernel, run on the CPU, against float64: a process of its own, since Triton must not interpret."""

from __future__ import annotations

import sys
from itertools import cycle

import torch
from gluon_on_cpu import OnCPU
from triton_cases import HOPPER_RING_CASES, poison, ring_failures

from power_retention.ops.triton import backend
from power_retention.ops.triton.hopper import decode, ring


def main() -> int:
    OnCPU(decode, "decode_kernel")
    taken = []
    ring.covers = lambda *_: taken.append(True) or True
    programs = cycle((3, 40, 1))
    ring.multiprocessors = lambda device: next(programs)
    backend.TritonBackend.devices = ("cpu",)
    torch.empty, torch.empty_like = poison(torch.empty), poison(torch.empty_like)
    bad = 0
    for name, case in HOPPER_RING_CASES.items():
        wrong = ring_failures(case, "cpu")
        bad += bool(wrong)
        print(f"{name}: {'; '.join(wrong) or 'right'}", flush=True)
    assert len(taken) == sum(len(case.pieces) for case in HOPPER_RING_CASES.values()), "another kernel was checked"
    return bad


if __name__ == "__main__":
    sys.exit(main())
