"""The Triton kernels, run by Triton's interpreter on the CPU: small ragged shapes against float64, memory poisoned with NaN."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from power_retention.ops import RingState, backends
from power_retention.ops.triton.hopper import ring as hopper_ring
from power_retention.ops.triton.plan import make_plan

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=HERE, check=False)


def test_kernels_agree_with_float64() -> None:
    done = run("triton_cases.py", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import power_retention.ops; new = set(sys.modules) - before"
    code += "; assert 'triton' not in new"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_cpu_tensors_pass_by_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    x = torch.randn(1, 5, 2, 16)
    call = backends.Call(x, x, x, None, None, None, None, 2, 0, False)
    assert backends.choose_backend(call).name == "torch"
    assert not recwarn.list


@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_packed_slots_cover_every_token_once(size: int) -> None:
    borders = torch.tensor([0, 5, 30, 37])
    plan = make_plan(1, 37, borders, size, torch.device("cpu"))
    covered = torch.cat([torch.arange(int(a), int(b)) for a, b, _, _ in plan.table])
    assert covered.tolist() == list(range(37))
    assert plan.table.shape[0] == plan.slots >= int(plan.borders[-1])


def test_kernels_compile_for_gpus() -> None:
    done = run("compile_for_gpu.py", "90", "80")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_hopper_kernels_agree_with_float64() -> None:
    done = run("hopper_cases.py", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_the_hopper_ring_kernel_agrees_with_float64() -> None:
    done = run("hopper_decoding_cases.py", TRITON_INTERPRET="0", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(("between", "fits"), [(0, True), (128, True), (24, False)])
def test_pages_that_are_no_whole_rows_apart_go_to_the_portable_kernel(between: int, fits: bool) -> None:
    ring = RingState.empty(3, 2, 64, dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    width = ring.memory[0].numel()
    pages = torch.zeros(3, width + between, dtype=torch.bfloat16)[:, :width].unflatten(1, ring.memory.shape[1:])
    assert hopper_ring.addressable(replace(ring, memory=pages)) is fits


def test_states_past_what_the_copy_engine_counts_go_to_the_portable_kernel() -> None:
    def ring(slots: int) -> RingState:
        return RingState.empty(slots, 8, 128, dtype=torch.bfloat16, state_dtype=torch.bfloat16, device="meta")

    rows = 8 * 8256
    assert hopper_ring.addressable(ring((1 << 31) // rows))
    assert not hopper_ring.addressable(ring((1 << 31) // rows + 1))
