"""Which tensor stood under which name after each step, so that going back reads again only what changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from adkit.graph.snapshot import Snapshot
from adkit.models.loading import FUSED, LOCAL


class Stamp:
    """One tensor's data at one moment.

    ``loadable``: the factory gives the same data again. Such a tensor is held weakly, so that a pass can
    free it; a graph's own constant is small and cannot be had again, so it is held. Changes in place are
    told by torch's version counter and by a few sampled elements (``.data`` writes past the counter). ``recipe``: what
    of the model's weights it was made of (:func:`recipe_of`).
    """

    __slots__ = ("_get", "_sample", "_version", "loadable", "recipe")

    def __init__(self, tensor: Tensor, *, loadable: bool, hold: bool = False, recipe: Any = None) -> None:
        self.loadable, self.recipe = loadable, recipe
        self._take(tensor, hold)

    def _take(self, tensor: Tensor, hold: bool) -> None:
        self._get: Callable[[], Tensor | None] = (lambda: tensor) if hold else weakref.ref(tensor)
        self._version, self._sample = _version(tensor), _sample(tensor)

    def tensor(self) -> Tensor | None:
        """The tensor as it was; None when it is gone or was changed in place."""
        t = self._get()
        return t if t is not None and self.holds(t) else None

    @property
    def changed(self) -> bool:
        """True when the tensor lives and was changed in place."""
        t = self._get()
        return t is not None and not self.holds(t)

    def holds(self, tensor: Tensor) -> bool:
        """True when ``tensor`` is this one, unchanged."""
        return self._get() is tensor and _version(tensor) == self._version and _sample(tensor) == self._sample

    def renew(self, tensor: Tensor) -> None:
        """The factory gave the data again, as ``tensor``."""
        self._take(tensor, False)


Stamps = dict[str, Stamp]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _sample(t: Tensor, count: int = 8) -> str:
    """A few elements as text (text, because a NaN is not equal to itself)."""
    if not t.numel():
        return ""
    t = t.detach()
    flat = t.view(-1) if t.is_contiguous() else t[(0,) * t.dim()].view(1)
    return str(flat[:: max(1, flat.numel() // count)][:count].tolist())


def take_stamps(
    gm: GraphModule, snapshot: Snapshot, previous: Stamps, factory: Any, loads: bool = False
) -> Stamps:
    """Stamps of every tensor the graph reads that has data; those of unchanged tensors are shared.

    ``loads``: the step just run read weights, so what is new under a weight's name is what the factory gives.
    """
    fused = gm.meta.get(FUSED, {})
    recipes = {**fused, **gm.meta.get(LOCAL, {})}
    changed = {p for n, s in previous.items() if not s.loadable for p in (n, *_parts(s.recipe))}
    stamps: Stamps = {}
    for name in dict.fromkeys(n.target for n in snapshot if n.op == "get_attr"):
        tensor = tensor_at(gm, name)
        if tensor is None or tensor.is_meta:
            continue
        old = previous.get(name)
        if old is not None and old.holds(tensor):
            stamps[name] = old
            continue
        stored = factory is not None and (name in recipes or name in factory.tensors)
        # Data under a name that had none was loaded, or fused from what was loaded; other data a pass made, and
        # what is fused of such data the factory cannot give either.
        loadable = stored and (loads or (old is None and changed.isdisjoint(fused.get(name, ()))))
        stamps[name] = Stamp(tensor, loadable=loadable, hold=not stored, recipe=recipe_of(gm, name))
    return stamps


def recipe_of(gm: GraphModule, name: str) -> Any:
    """What loading makes the tensor of: the part of a weight, the weights fused, or None for a whole one."""
    local = gm.meta.get(LOCAL, {})
    fused = gm.meta.get(FUSED, {}).get(name)
    return local.get(name) if fused is None else [(p, local.get(p)) for p in fused]


def _parts(recipe: Any) -> list[str]:
    """The weights that a recipe of a fused one names."""
    return [name for name, _ in recipe] if isinstance(recipe, list) else []


def altered(before: Stamps, after: Stamps) -> tuple[str, ...]:
    """Names whose data a step changed under the same name."""
    found = []
    for name, stamp in after.items():
        old = before.get(name)
        if old is None or old is stamp or stamp.loadable:
            continue
        was, now = old.tensor(), stamp.tensor()
        if was is None or now is None or was.shape != now.shape or not torch.equal(was.to(now), now):
            found.append(name)
    return tuple(found)


def lost(names: list[str], wanted: Stamps) -> list[str]:
    """Of ``names``, those whose data as stamped can neither be found nor loaded."""
    return [n for n in names if n in wanted and not wanted[n].loadable and wanted[n].tensor() is None]


def restore(gm: GraphModule, names: list[str], wanted: Stamps, current: Stamps) -> list[str]:
    """Put the tensors of ``wanted`` back into ``gm``; returns the names that the factory must load again.

    A name without a stamp had no data then: what was loaded since stays, so that it is not read twice, and is
    added to ``wanted``; anything else goes back to a shape.
    """
    reload = []
    for name in names:
        tensor = tensor_at(gm, name)
        assert tensor is not None
        want, have = wanted.get(name), current.get(name)
        if want is None:
            if tensor.is_meta:
                continue
            same = have is not None and have.recipe == recipe_of(gm, name)
            if have is not None and same and have.loadable and have.holds(tensor):
                wanted[name] = have
            else:
                put_tensor(gm, name, torch.empty_like(tensor, device="meta"))
        elif want.holds(tensor):
            continue
        elif (kept := want.tensor()) is not None:
            put_tensor(gm, name, kept)
        else:
            put_tensor(gm, name, torch.empty_like(tensor, device="meta"))
            reload.append(name)
    return reload


def tensor_at(module: torch.nn.Module, path: str) -> Tensor | None:
    """The tensor at a dotted path, or None."""
    at: Any = module
    for part in path.split("."):
        at = getattr(at, part, None)
    return at if isinstance(at, Tensor) else None


def put_tensor(module: torch.nn.Module, path: str, tensor: Tensor) -> None:
    """Set the tensor at a dotted path, making modules on the way; a parameter where it is floating point."""
    *parents, name = path.split(".")
    at: Any = module
    for part in parents:
        if not hasattr(at, part):
            setattr(at, part, torch.nn.Module())
        at = getattr(at, part)
    old = getattr(at, name, None)
    if hasattr(at, name):
        delattr(at, name)
    if isinstance(tensor, torch.nn.Parameter):
        at.register_parameter(name, tensor)
    elif isinstance(old, torch.nn.Parameter) or (old is None and tensor.is_floating_point()):
        at.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    else:
        at.register_buffer(name, tensor, persistent=False)
