"""Compiles the ring kernels for GPUs, without one: the interpreter does not see what only the compiler refuses.

A process of its own, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from power_retention.ops import RingState
from power_retention.ops.triton import backend
from power_retention.ops.triton.hopper import decode
from power_retention.ops.triton.hopper import ring as hopper_ring
from power_retention.ops.triton.ring import ring_kernel

LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Stands where a kernel stood, and keeps the arguments of its launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.record

    def record(self, *arguments: Any, **constants: Any) -> None:
        self.arguments, self.constants = arguments, constants


class OnAnyDevice(backend.TritonBackend):
    devices = ("cpu",)


def launch(dtype: torch.dtype, state_dtype: torch.dtype, query_heads: int, tokens: int, width: int) -> Recorder:
    """The launch that such a call makes."""
    recorder = Recorder()
    backend.kernels = lambda name: type("Kernels", (), {"ring_kernel": recorder})
    q, k = torch.zeros(2, tokens, query_heads, width, dtype=dtype), torch.zeros(2, tokens, 1, width, dtype=dtype)
    ring = RingState.empty(2, 1, width, dtype=dtype, state_dtype=state_dtype)
    y = OnAnyDevice().decode(q, k, k, torch.zeros(2, tokens, 1), ring, torch.arange(2))
    assert y is not None
    return recorder


def compile_launch(recorder: Recorder, capability: int) -> int:
    """Size of the binary."""
    names, types = ring_kernel.arg_names, {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
    types |= {torch.int32: "i32", torch.int64: "i64"}
    given = dict(zip(names, recorder.arguments, strict=False))
    signature = {name: "*" + types[x.dtype] if isinstance(x, Tensor) else "i32" for name, x in given.items()}
    options = {name: x for name, x in recorder.constants.items() if name in LAUNCH_OPTIONS}
    constants = {(names.index(name),): x for name, x in recorder.constants.items() if name not in options}
    signature |= {names[index[0]]: "constexpr" for index in constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, x in given.items() if isinstance(x, Tensor)}
    source = ASTSource(ring_kernel, {name: signature[name] for name in names}, constants, aligned)
    return len(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"])


class AbsentGPU:
    """A driver for what only wants to know what to compile for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_hopper(query_heads: int, width: int) -> str:
    """What the assembler says of the Hopper kernel for such a call."""
    kernel, recorder = decode.decode_kernel, Recorder()
    decode.decode_kernel = recorder
    q, k = (torch.zeros(2, 1, heads, width, dtype=torch.bfloat16) for heads in (2 * query_heads, 2))
    ring = RingState.empty(2, 2, width, dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    hopper_ring.launch(q, k, k, torch.zeros(2, 1, 2), ring, torch.arange(2), 132)
    decode.decode_kernel = kernel
    driver.set_active(AbsentGPU())
    compiled = kernel.warmup(*recorder.arguments, **recorder.constants, grid=(1,))
    with TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            "--gpu-name=sm_90a",
            source,
            "-o",
            source.with_suffix(".cubin"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    for query_heads, width in ((5, 128), (1, 64)):
        said = compile_hopper(query_heads, width)
        # Told of products that wait for each other, for want of registers or of a way to see that they need not.
        assert "serialized" not in said, said
        assert " 0 bytes spill stores, 0 bytes spill loads" in said, said
        print("hopper", query_heads, width, "compiled")
    bf16, f32, f16 = torch.bfloat16, torch.float32, torch.float16
    calls = [(bf16, bf16, 5, 1, 128), (f16, f32, 4, 3, 16)]
    for capability, call in zip(map(int, sys.argv[1:]), calls, strict=True):
        print(capability, call, compile_launch(launch(*call), capability), "bytes")
