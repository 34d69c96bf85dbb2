"""The adapter against the real torchtitan 0.3, by hand, where it is installed; two processes, no GPU.

    pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 torch_checkpointing torchdata tyro docstring_parser typeguard
    for way in tensor pipeline; do
        PYTHONPATH=src:tests torchrun --nproc-per-node 2 tests/neighbours/check_torchtitan.py $way
    done

A model is saved, opened by torchtitan's own loader under its names, divided by its FSDP with full activation checkpointing and
by tensor parallelism, or cut by its pipeline and run under a 1F1B schedule: loss and gradients must be the whole model's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC
from transformers import AutoModelForCausalLM

from power_retention.training.titan import TitanWeights, titan_spec
from tiny_models import tiny_model, tokens

BATCH, LENGTH, TOLERANCE = 4, 24, 5e-5


@dataclass
class Dims:
    """As much of torchtitan's dimensions as is asked for; its own want a GPU."""

    mesh: DeviceMesh
    tp_enabled: bool
    pp_enabled: bool
    pp: int
    dp_replicate_enabled: bool = False

    def get_mesh(self, names: str | list[str]) -> DeviceMesh:
        return self.mesh[names if isinstance(names, str) else tuple(names)]

    def get_optional_mesh(self, names: str | list[str]) -> DeviceMesh | None:
        known = self.mesh.mesh_dim_names or ()
        return self.get_mesh(names) if {names, *names} & set(known) else None


def loss_of(logits: Tensor, labels: Tensor, *unused: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def fill(part: nn.Module, weights: TitanWeights, folder: Path) -> None:
    """As torchtitan's trainer does: random weights, then those of the folder."""
    part.to_empty(device="cpu")
    with torch.no_grad():
        part.init_weights(buffer_device=None)
    ours = weights.to_hf(part.state_dict())
    load_tensors(ours, storage_reader=weights.get_hf_storage_reader(str(folder)))
    part.load_state_dict(weights.from_hf(ours))


def compare(part: nn.Module, weights: TitanWeights, wanted: Mapping[str, Tensor], scale: float) -> int:
    """How many gradients are right; refuses a wrong one."""
    right = 0
    for name, value in part.named_parameters():
        ours = next(iter(weights.to_hf({name.replace("._checkpoint_wrapped_module", ""): None})))
        got = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
        assert got is not None, name
        largest = max(float(wanted[ours].abs().max()), 1e-2)
        assert float((got / scale - wanted[ours]).abs().max()) < TOLERANCE * largest, name
        right += 1
    return right


def main(way: str, folder: Path, tied: bool) -> str:
    pipeline = way == "pipeline"
    if dist.get_rank() == 0:
        tiny_model(num_hidden_layers=4, qk_norm=True, tie_word_embeddings=tied).save_pretrained(folder)
    dist.barrier()
    whole = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens(BATCH, LENGTH)
    wanted = loss_of(whole(ids, use_cache=False).logits, ids)
    wanted.backward()
    gradients = {name: value.grad for name, value in whole.named_parameters() if value.grad is not None}

    spec, names = titan_spec(folder), ("pp", "fsdp") if pipeline else ("fsdp", "tp")
    degree = "pipeline_parallel_degree" if pipeline else "tensor_parallel_degree"
    parallelism = ParallelismConfig(
        spmd_backend="partial_dtensor",
        pipeline_parallel_schedule="1F1B",
        pipeline_parallel_microbatch_size=1,
        **{degree: 2},
    )
    spec.model.update_from_config(config=type("Config", (), {"parallelism": parallelism}))
    training = TrainingConfig(
        local_batch_size=BATCH, seq_len=LENGTH, mixed_precision_param="float32", mixed_precision_reduce="float32"
    )
    mesh = init_device_mesh("cpu", (2, 1) if pipeline else (1, 2), mesh_dim_names=names)
    how = {
        "parallel_dims": Dims(mesh, not pipeline, pipeline, 2 if pipeline else 1),
        "training": training,
        "parallelism": parallelism,
        "compile_config": CompileConfig(enable=False),
        "ac_config": FullAC.Config(),
        "dump_folder": "",
    }
    with torch.device("meta"):
        model = spec.model.build()
    model.verify_module_protocol()
    weights = TitanWeights(spec.model, str(folder))
    if not pipeline:
        model = spec.parallelize_fn(model, **how)
        fill(model, weights, folder)
        loss = loss_of(model(ids), ids)
        loss.backward()
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
        return f"{compare(model, weights, gradients, 1)} gradients right"
    schedule, parts, first, last = spec.pipelining_fn(
        model,
        device=torch.device("cpu"),
        model_config=spec.model,
        parallelize_fn=spec.parallelize_fn,
        loss_fn=lambda *given, **more: (loss_of(*given), {}),
        **how,
    )
    for part in parts:
        fill(part, weights, folder)
    losses: list[Tensor] = []
    schedule.step(*([ids] if first else []), **({"target": ids, "losses": losses} if last else {}))
    if last:
        torch.testing.assert_close(sum(losses) / BATCH, wanted, rtol=1e-6, atol=0)
    return f"{sum(compare(part, weights, gradients, BATCH) for part in parts)} gradients right"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    place = [tempfile.mkdtemp()]
    dist.broadcast_object_list(place)
    for tied in (False, True) if sys.argv[1] == "tensor" else (False,):
        print(f"rank {dist.get_rank()}, tied {tied}:", main(sys.argv[1], Path(place[0]) / str(tied), tied))
    dist.barrier()
    dist.destroy_process_group()
