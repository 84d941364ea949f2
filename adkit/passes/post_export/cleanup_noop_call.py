"""``cleanup_noop_call``: calls that return what they were given."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.post_export._replace import bypass, fresh_copies_kept, same_value
from adkit.passes.registry import register

_aten = torch.ops.aten
_COPIES = frozenset((_aten.lift_fresh_copy.default, _aten.dropout.default, _aten.clone.default))
_ALWAYS = frozenset(
    (
        _aten.detach.default,
        _aten.detach_.default,
        _aten.alias.default,
        _aten.lift_fresh.default,
        _aten.lift_fresh_copy.default,
    )
)
_DROPOUTS = frozenset((_aten.dropout.default, _aten.feature_dropout.default))
_SHAPING = frozenset(
    (_aten.expand.default, _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
)


def _is_noop(node: Node) -> bool:
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in _ALWAYS:
        return True
    if node.target in _DROPOUTS:
        probability, training = node.args[1:3]
        return bool(probability == 0 or training is False)
    if node.target is _aten.clone.default:
        return same_value(node.args[0], node) and _strides(node.args[0]) == _strides(node)
    return node.target in _SHAPING and same_value(node.args[0], node)


def _strides(node: Node) -> tuple[str, ...]:
    return tuple(str(s) for s in node.meta["val"].stride())


@register
class CleanupNoopCall(Pass):
    """Bypass calls that return their input: eval-mode dropout, detach, expand or view to the same shape.

    They compute nothing. ``detach_`` and ``lift_fresh_copy`` come from tensors that a forward builds from
    numbers; in inference nobody needs their copy.

        before: %d = aten.dropout(%x, 0.1, False)
                %y = aten.add.Tensor(%residual, %d)
        after:  %y = aten.add.Tensor(%residual, %x)
    """

    key = "cleanup_noop_call"
    stage = Stage.POST_EXPORT

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Bypass every such call."""
        kept = fresh_copies_kept(gm)
        return PassInfo(
            num_matches=bypass(gm, lambda n: _is_noop(n) and not (n.target in _COPIES and kept(n)))
        )
