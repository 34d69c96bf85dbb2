"""The Hopper kernels, run on the CPU, forward and backward, against float64: a process of its own, where Triton interprets.

The kernels that only prepare are interpreted; those of ``ops/triton/hopper`` run as :mod:`gluon_on_cpu` says.
"""

from __future__ import annotations

import sys

import interpreter  # noqa: F401
import torch
from gluon_on_cpu import OnCPU
from triton_cases import Case, failures, poison

from power_retention.ops.triton.hopper import accumulate, attend, attend_backward, contract, read, run

bf16, wide = torch.bfloat16, (64, 64)
lasting = -0.05
"""Gates with which much of what a chunk found is still there after the next."""

CASES = {
    "two chunks, grouped heads, states": Case(1, 200, (2, 1), wide, 128, 2, bf16, lasting, True),
    "packed with states": Case(1, 206, (2, 1), wide, 128, 2, bf16, lasting, True, (5, 130, 1, 70)),
    "two rows of the batch, two heads, no gates": Case(2, 150, (2, 2), wide, 128, 2, bf16, None),
    "gates that forget everything": Case(1, 140, (1, 1), wide, 64, 2, bf16, -300.0, True),
    "attention": Case(1, 270, (2, 1), wide, 0, 2, bf16, lasting),
    "attention, packed, narrow heads": Case(1, 206, (2, 1), (40, 56), 0, 2, bf16, lasting, runs=(5, 130, 1, 70)),
    "one token": Case(1, 1, (1, 1), wide, 128, 2, bf16, state=True),
    "walks in two segments": Case(1, 250, (1, 1), wide, 32, 2, bf16, lasting, True),
    "width 128": Case(1, 140, (1, 1), (128, 128), 128, 2, bf16, lasting),
}


def main(names: list[str]) -> int:
    """Check the named cases, or all; the exit status counts the wrong ones."""
    kernels = [
        OnCPU(accumulate, "accumulate_kernel", together=True),
        OnCPU(read, "read_state_kernel"),
        OnCPU(contract, "contract_state_kernel"),
        OnCPU(attend, "attend_kernel"),
        OnCPU(attend_backward, "query_grad_kernel"),
        OnCPU(attend_backward, "key_grad_kernel"),
    ]
    run.on_hopper = lambda device: True
    torch.empty, torch.empty_like = poison(torch.empty), poison(torch.empty_like)
    bad = 0
    for n, name in enumerate(names or CASES):
        # Few, so that each has several tiles to do; or many, so that walks are handed from one to another.
        run.HopperRun.processors = 7 if "segments" in name else 1 + n % 2
        for kernel in kernels:
            kernel.launches.clear()
        wrong = failures(CASES[name], "cpu")
        assert all(kernel.launches for kernel in kernels[3:]), "other kernels were checked"
        if "segments" in name:
            assert all(launch["segments"] == 2 for launch in kernels[0].launches), "walks were not cut"
        bad += bool(wrong)
        print(f"{name}: {'; '.join(wrong) or 'right'}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
