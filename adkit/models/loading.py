"""Filling a graph module's tensors from a factory: all of them, or a few after a pass touched them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from adkit.contract import ModelError
from adkit.graph.snapshot import attribute
from adkit.models.factory import ModelFactory, Progress

FUSED = "adkit_weights"  # gm.meta[FUSED]: new name -> the old names it concatenates on dim 0


@dataclass
class Loaded:
    """What :func:`load_graph_tensors` did: ``tensors`` filled, their ``bytes`` (tied ones once), ``seconds``.

    ``tied`` name -> the name whose tensor it shares; ``constants`` tensors that the graph already held.
    """

    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    tied: dict[str, str] = field(default_factory=dict)
    constants: int = 0


def graph_tensor_names(gm: GraphModule) -> list[str]:
    """Names of the tensors that the graph reads, in order of use (not all the module's parameters)."""
    targets = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "get_attr")
    return [t for t in targets if isinstance(attribute(gm, t), Tensor)]


def load_graph_tensors(
    gm: GraphModule,
    factory: ModelFactory,
    names: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Loaded:
    """Fill the named tensors of a graph module (None: all that its graph reads) on ``device``.

    A name is a tensor of the Hugging Face module, or one that ``gm.meta["adkit_weights"]`` says is made of
    several concatenated on dim 0; parts are copied as they arrive, so the peak is the fused tensors and one
    part. Constants of the graph itself that hold data are moved to the device. Tied names stay one tensor.
    Raises ModelError for a name that is none of these, CheckpointError as the factory does.
    """
    began = time.perf_counter()
    device = torch.device(device)
    wanted = graph_tensor_names(gm) if names is None else list(dict.fromkeys(names))
    fused: dict[str, tuple[str, ...]] = {
        n: tuple(p) for n, p in gm.meta.get(FUSED, {}).items() if n in set(wanted)
    }
    known = factory.tensors
    plain, constants, lost = [], [], []
    for name in wanted:
        if name in fused:
            lost += [f"{p} (part of {name})" for p in fused[name] if p not in known]
        elif name in known:
            plain.append(name)
        elif isinstance(held := attribute(gm, name), Tensor) and not held.is_meta:
            constants.append(name)
        else:
            lost.append(name)
    if lost:
        raise ModelError(
            f"the graph reads {', '.join(lost[:5])}, which {factory.name} does not have and the graph does "
            f"not hold: a pass that makes a parameter records its parts in gm.meta[{FUSED!r}]"
        )

    slots = _slots(fused, known)
    result = Loaded(constants=len(constants))
    partial: dict[str, Tensor] = {}
    left = {name: len(parts) for name, parts in fused.items()}
    # holds each tensor too: an id says which tensor it is only while that tensor lives
    set_as: dict[int, tuple[str, nn.Parameter | Tensor, Tensor]] = {}
    keep = set(plain)
    for name, tensor in factory.load([*plain, *(p for p in slots if p not in keep)], device, progress):
        if name in keep:
            if id(tensor) in set_as:
                first, value, _ = set_as[id(tensor)]
                result.tied[name] = first
                _set(gm, name, value)
            else:
                set_as[id(tensor)] = (name, _set(gm, name, tensor), tensor)
                result.bytes += tensor.numel() * tensor.element_size()
            result.tensors += 1
        for target, start in slots.get(name, ()):
            if target not in partial:
                rows = sum(known[p].shape[0] for p in fused[target])
                partial[target] = tensor.new_empty((rows, *tensor.shape[1:]))
            partial[target][start : start + tensor.shape[0]] = tensor
            left[target] -= 1
            if not left[target]:
                whole = partial.pop(target)
                _set(gm, target, whole)
                result.tensors += 1
                result.bytes += whole.numel() * whole.element_size()
        del tensor
    for name in constants:
        _set(gm, name, cast(Tensor, attribute(gm, name)).detach().to(device))
    result.seconds = time.perf_counter() - began
    return result


def _slots(fused: dict[str, tuple[str, ...]], known: dict[str, Tensor]) -> dict[str, list[tuple[str, int]]]:
    """Part name -> (fused name, its first row there)."""
    slots: dict[str, list[tuple[str, int]]] = {}
    for name, parts in fused.items():
        row = 0
        for part in parts:
            slots.setdefault(part, []).append((name, row))
            row += known[part].shape[0]
    return slots


def _set(gm: nn.Module, name: str, value: Tensor) -> nn.Parameter | Tensor:
    """Put a tensor where the module has a parameter, buffer or plain attribute of that name."""
    path, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(path)
    if leaf in owner._parameters:
        value = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        owner._parameters[leaf] = value
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value.detach()
    else:
        setattr(owner, leaf, value)
    return value
