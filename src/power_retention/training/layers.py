"""How layers are run while they are trained: compiled, computed again in the backward pass, listened to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def compile_layers(layers: Iterable[Any], *, whole: bool = False) -> None:
    """Compile the parts of every layer, and ``whole`` layers where no hook lies between their parts; once for all layers.

    What modules compute rather than the modules: hooks around them go on working.
    """
    for layer in layers:
        for part in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp):
            part.forward = torch.compile(part.forward)
        if whole:
            layer.forward = torch.compile(layer.forward)


def compile_tokenwise(layers: Iterable[Any]) -> None:
    """Compile what layers of ours do to each token by itself: nothing is compiled anew where documents begin elsewhere."""
    for layer in layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.forward = torch.compile(part.forward, dynamic=True)
        mixer = layer.self_attn
        for name in ("queries", "keys", "log_gates"):
            setattr(mixer, name, torch.compile(getattr(mixer, name), dynamic=True))


def recompute_layers(layers: Iterable[Any]) -> None:
    """Keep a layer's input only, and compute the layer again in the backward pass."""
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = True


@contextmanager
def outputs_kept(layers: Iterable[Any]) -> Iterator[list[Tensor]]:
    """The list that each layer's output comes into, in the order they are called."""
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(lambda *call: outputs.append(call[-1])).remove)
        yield outputs
