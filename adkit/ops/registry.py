"""How an adkit op is defined: schema, reference, fake, and facts that passes rely on.

``torch.ops.adkit.<name>`` is defined once, here through :func:`define`; its :class:`OpInfo` says whether it
is token-local (each output token depends only on the same input token) and which backend and category it
is of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adkit.graph.cost import COSTS, CostFn

_LIB = torch.library.Library("adkit", "DEF")


@dataclass(frozen=True)
class OpInfo:
    """Facts about one op, and its functions: ``reference`` runs it, ``fake`` gives shapes and dtypes.

    ``syncs``: it reads values on the host, so a CUDA graph cannot hold it.
    """

    name: str
    schema: str
    category: str
    backend: str
    token_local: bool
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    doc: str
    syncs: bool = False

    @property
    def overload(self) -> Any:
        """The ``OpOverload`` that graphs hold."""
        return getattr(torch.ops.adkit, self.name).default


OPS: dict[str, OpInfo] = {}


def define(
    schema: str,
    *,
    category: str,
    token_local: bool,
    fake: Callable[..., Any],
    cost: CostFn | None = None,
    syncs: bool = False,
    backend: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: define ``torch.ops.adkit.<name>`` with the decorated function as implementation.

    ``schema`` is ``name(args) -> returns``; the name starts with its backend (``torch_``, ``triton_``...).
    ``cost`` counts FLOPs and bytes for the cost model; without one each element costs one operation.
    ``syncs`` says that it reads values on the host; ``backend`` names it where the op's name does not.
    """

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(", 1)[0]
        _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIB.impl(name, fn, "CompositeExplicitAutograd")
        torch.library.register_fake(f"adkit::{name}", fake, lib=_LIB)
        if cost is not None:
            COSTS[f"adkit.{name}"] = cost
        doc = (fn.__doc__ or "").strip()
        OPS[name] = OpInfo(
            name, schema, category, backend or name.split("_", 1)[0], token_local, fn, fake, doc, syncs
        )
        return fn

    return add


def info_of(target: Any) -> OpInfo | None:
    """The :class:`OpInfo` behind a call target, or None when it is not an adkit op."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "adkit":
        return OPS[target.name().split("::", 1)[1].split(".", 1)[0]]
    return None
