"""Filling a graph module's tensors from a factory: all of them, or a few after a pass touched them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.contract import EngineConfig, LocalWeight, ModelError
from adkit.graph.snapshot import attribute
from adkit.models.factory import ModelFactory, Progress
from adkit.models.memory import MemoryEstimate, estimate

FUSED = "adkit_weights"  # gm.meta[FUSED]: new name -> the old names it concatenates on dim 0
LOCAL = "adkit_local"  # gm.meta[LOCAL]: name -> the LocalWeight that one rank's graph reads under it


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

    A name is a tensor of the Hugging Face module; or one rank's part of it, as ``gm.meta["adkit_local"]`` says; or
    several of these concatenated on dim 0, as ``gm.meta["adkit_weights"]`` says. What is concatenated is copied as it
    arrives, so the peak is the fused tensors and one of theirs. Constants of the graph itself that hold data are
    moved to the device. Tied names stay one tensor.
    Raises ModelError for a name that is none of these, CheckpointError as the factory does.
    """
    began = time.perf_counter()
    device = torch.device(device)
    wanted = graph_tensor_names(gm) if names is None else list(dict.fromkeys(names))
    fused: dict[str, tuple[str, ...]] = {
        n: tuple(p) for n, p in gm.meta.get(FUSED, {}).items() if n in set(wanted)
    }
    local: dict[str, LocalWeight] = gm.meta.get(LOCAL, {})
    shapes = _Shapes(factory.tensors, local)
    plain, constants, lost = [], [], []
    for name in wanted:
        if name in fused:
            lost += [f"{p} (part of {name})" for p in fused[name] if p not in shapes]
        elif name in shapes:
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

    slots = _slots(fused, shapes)
    result = Loaded(constants=len(constants))
    partial: dict[str, Tensor] = {}
    left = {name: len(parts) for name, parts in fused.items()}
    # holds each tensor too: an id says which tensor it is only while that tensor lives
    set_as: dict[int, tuple[str, nn.Parameter | Tensor, Tensor]] = {}
    keep = set(plain)
    names = [*plain, *(p for p in slots if p not in keep)]
    for name, tensor in factory.load(names, device, progress, local):
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
                rows = sum(shapes[p][0] for p in fused[target])
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


class _Shapes:
    """Shapes of what can be loaded by name: the model's tensors, and parts of them."""

    def __init__(self, known: dict[str, Tensor], local: dict[str, LocalWeight]) -> None:
        self._known, self._local = known, local

    def __contains__(self, name: str) -> bool:
        return (self._local[name].name if name in self._local else name) in self._known

    def __getitem__(self, name: str) -> tuple[int, ...]:
        part = self._local.get(name, LocalWeight(name))
        return part.shape(self._known[part.name].shape)


def _slots(fused: dict[str, tuple[str, ...]], shapes: _Shapes) -> dict[str, list[tuple[str, int]]]:
    """Part name -> (fused name, its first row there)."""
    slots: dict[str, list[tuple[str, int]]] = {}
    for name, parts in fused.items():
        row = 0
        for part in parts:
            slots.setdefault(part, []).append((name, row))
            row += shapes[part][0]
    return slots


def graph_memory(
    gm: GraphModule, factory: ModelFactory, engine: EngineConfig, device: torch.device, kv_per_token: int = 0
) -> MemoryEstimate:
    """What a graph needs on a device: the weights that it reads and its own heads' cache, as one rank has them.

    ``kv_per_token``: bytes of cache a token, once that is known; 0: as the graph's attention reads keys and values.
    """
    names = graph_tensor_names(gm)
    once = {id(t): t for t in (cast(Tensor, attribute(gm, n)) for n in names)}
    values = [
        node.args[i].meta["val"]
        for node in gm.graph.nodes
        if node.target is torch.ops.adkit.torch_attention.default
        and node.kwargs.get("layout", "bsnd") == "bsnd"
        for i in (1, 2)
    ]
    per_token = kv_per_token or int(sum(v.shape[2] * v.shape[3] * v.dtype.itemsize for v in values))
    return estimate(
        factory.name, factory.config, factory.dtype, once.values(), engine, device, per_token or None
    )


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
