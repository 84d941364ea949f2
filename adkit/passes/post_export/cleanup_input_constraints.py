"""``cleanup_input_constraints``: asserts, guards and range constraints that export leaves behind."""

from __future__ import annotations

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from adkit.graph.edit import clean
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register

_NAMES = frozenset(
    (
        "aten::_assert_tensor_metadata",
        "aten::_assert_async",
        "aten::_assert_scalar",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
        "aten::_functional_assert_async",
        "aten::_functional_assert_scalar",
    )
)


def _is_constraint(node: Node) -> bool:
    if node.op == "call_module":
        return "_guards" in str(node.target)
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return node.target._schema.name in _NAMES
    return getattr(node.target, "__name__", "") in ("_check", "_assert", "sym_constrain_range")


@register
class CleanupInputConstraints(Pass):
    """Erase asserts, guards and range constraints, and the sizes computed only for them.

    ``torch.export`` writes down what it assumed while tracing: dtypes and devices of intermediate values,
    ranges of sizes. They pin the graph to the export's device, and as extra readers they hide the chains that
    matchers look for. adkit checks its inputs where they enter, in the runtime.

        before: %a = aten._assert_tensor_metadata(%x, dtype=torch.float32, device=cpu)
                %y = aten.to.dtype(%x, torch.float32)
        after:  %y = aten.to.dtype(%x, torch.float32)
    """

    key = "cleanup_input_constraints"
    stage = Stage.POST_EXPORT

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Erase every constraint, then what is dead."""
        found = [n for n in gm.graph.nodes if _is_constraint(n) and not n.users]
        for node in reversed(found):
            gm.graph.erase_node(node)
        if found:
            gm.delete_all_unused_submodules()
            clean(gm)
        return PassInfo(num_matches=len(found))
