"""Compiles kernels for GPUs, without one: the interpreter does not see what only the compiler refuses.

A process of its own, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from io import StringIO
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from power_retention.ops import RingState
from power_retention.ops.backends import Call
from power_retention.ops.triton import backend, backward, prepare
from power_retention.ops.triton.hopper import accumulate, attend, attend_backward, contract, decode, read
from power_retention.ops.triton.hopper import ring as hopper_ring
from power_retention.ops.triton.hopper import run as hopper_run
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


def assembled(kernel: Any, recorder: Recorder) -> str:
    """What the assembler says of such a launch."""
    said = StringIO()
    with redirect_stdout(said):
        kernel.warmup(*recorder.arguments, **recorder.constants, grid=(1,))
    assert "registers" in said.getvalue(), "the assembler was not heard"
    return said.getvalue()


def recorded(modules: tuple[ModuleType, ...]) -> dict[str, tuple[Any, Recorder]]:
    """Puts a recorder in the place of every kernel of the modules: name → (kernel, recorder)."""
    found = {}
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                found[name] = kernel, Recorder()
                setattr(module, name, found[name][1])
    return found


def compile_hopper_decoding(query_heads: int, width: int) -> str:
    """What the assembler says of the Hopper kernel for such a call."""
    kernel, recorder = decode.decode_kernel, Recorder()
    decode.decode_kernel = recorder
    q, k = (torch.zeros(2, 1, heads, width, dtype=torch.bfloat16) for heads in (2 * query_heads, 2))
    ring = RingState.empty(2, 2, width, dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    hopper_ring.launch(q, k, k, torch.zeros(2, 1, 2), ring, torch.arange(2), 132)
    decode.decode_kernel = kernel
    return assembled(kernel, recorder)


def launch_hopper(width: int) -> None:
    """A call forward and backward, with states, of which nothing is computed."""
    q, k = (torch.zeros(1, 512, heads, width, dtype=torch.bfloat16) for heads in (2, 1))
    call = Call(q, k, k, torch.zeros(1, 512, 1), None, None, None, 2, 128, True)
    run = hopper_run.HopperRun(call)
    run.read()
    memory, normalizer = run.final_state()
    run.backward(q, memory, normalizer)


def check(said: str, *kernel: Any) -> None:
    # Told of products that wait for each other, for want of registers or of a way to see that they need not.
    assert "C75" not in said, (kernel, said)
    assert "serialized" not in said, (kernel, said)
    print("hopper", *kernel, "compiled")


if __name__ == "__main__":
    driver.set_active(AbsentGPU())
    # The assembler speaks only when it works, not when a kernel of before is found.
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    for query_heads, width in ((5, 128), (1, 64)):
        said = compile_hopper_decoding(query_heads, width)
        assert " 0 bytes spill stores, 0 bytes spill loads" in said, said
        check(said, "decoding", query_heads, width)
    hopper_run.HopperRun.processors = 132
    recorded((prepare, backward))
    kernels = recorded((accumulate, read, contract, attend, attend_backward))
    wide = ("attend_kernel", "key_grad_kernel", "contract_state_kernel")
    for width, names in ((64, kernels), (128, wide)):
        launch_hopper(width)
        for name in names:
            check(assembled(*kernels[name]), name, width)
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = False
    bf16, f32, f16 = torch.bfloat16, torch.float32, torch.float16
    calls = [(bf16, bf16, 5, 1, 128), (f16, f32, 4, 3, 16)]
    for capability, call in zip(map(int, sys.argv[1:]), calls, strict=True):
        print(capability, call, compile_launch(launch(*call), capability), "bytes")
