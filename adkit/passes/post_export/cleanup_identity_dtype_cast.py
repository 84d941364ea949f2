"""``cleanup_identity_dtype_cast``: casts to the dtype and device a value already has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from adkit.graph.matching import arg
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.post_export._replace import bypass, fresh_copies_kept
from adkit.passes.registry import register

_aten = torch.ops.aten
_CASTS = frozenset(
    (
        _aten.to.dtype,
        _aten.to.dtype_layout,
        _aten.to.device,
        _aten.to.other,
        _aten.type_as.default,
    )
)


def _is_identity(node: Node) -> bool:
    if node.target not in _CASTS or not isinstance(node.args[0], Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.dtype == after.dtype
        and before.device == after.device
        and before.layout == after.layout
    )


def _copies(node: Node) -> bool:
    """True for ``to(..., copy=True)``."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return "copy" in names and bool(arg(node, names.index("copy"), "copy", False))


@register
class CleanupIdentityDtypeCast(Pass):
    """Bypass ``to(dtype)`` and ``to(device)`` where the value has that dtype and device already.

    Modelling code casts to float32 and back around norms and softmax whatever the model's dtype; in a float32
    model all of these are identities, and in a half-precision one those around values that are float32
    anyway.

        before: %a = aten.to.dtype(%x, torch.float32)      # x is float32
                %b = aten.pow.Tensor_Scalar(%a, 2)
        after:  %b = aten.pow.Tensor_Scalar(%x, 2)
    """

    key = "cleanup_identity_dtype_cast"
    stage = Stage.POST_EXPORT

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Bypass every cast that changes nothing."""
        kept = fresh_copies_kept(gm)
        return PassInfo(num_matches=bypass(gm, lambda n: _is_identity(n) and not (_copies(n) and kept(n))))
