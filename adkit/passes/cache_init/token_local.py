"""Proof that every op which is not a token mixer is token-local.

A packed batch puts tokens of different sequences side by side in one row. That is right only if each
op's output at a token depends on that token alone. The proof follows the token dimensions (sizes that
hold the batch or sequence symbol) through the graph: an op may reorder or carry them, but must not
reduce, contract, shift or index along them, nor compute from how many there are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from adkit.ops.mixers import MIXERS
from adkit.ops.registry import info_of

aten = torch.ops.aten

#: Only move elements about (no arithmetic): safe whatever the dimensions.
_LAYOUT = {
    "view",
    "reshape",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "expand",
    "transpose",
    "permute",
    "t",
    "flatten",
    "unflatten",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "to",
    "_to_copy",
    "lift_fresh_copy",
    "expand_as",
    "view_as",
    "reshape_as",
    "view_as_real",
    "view_as_complex",
    "movedim",
    "type_as",
    "numpy_T",
    "mT",
    "swapaxes",
    "real",
    "imag",
    "repeat",
    "repeat_interleave",
    "broadcast_to",
    "lift_fresh",
}
#: dim argument names what is reduced, normalised or ordered.
_ALONG_DIM = {
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "softmax",
    "_softmax",
    "log_softmax",
    "cumsum",
    "cumprod",
    "sort",
    "topk",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "prod",
    "any",
    "all",
    "flip",
    "roll",
    "glu",
    "diff",
    "cumsum_",
    "logcumsumexp",
    "kthvalue",
    "median",
    "scatter",
    "scatter_",
    "scatter_add",
    "index_select",
    "gather",
    "index_add",
    "unbind",
    "split",
    "split_with_sizes",
    "chunk",
    "select",
    "slice",
    "cat",
    "stack",
    "concat",
    "one_hot",
    "unfold",
    "tensor_split",
    "narrow",
    "var_mean",
    "take_along_dim",
    "count_nonzero",
}
#: Each element from the elements at its place, though torch does not tag them so.
_ELEMENTWISE = {
    "where", "masked_fill", "dropout", "copy", "copy_", "polar", "complex", "multiply", "divide",
    "true_divide", "subtract", "negative", "absolute", "square", "clip", "greater", "greater_equal",
    "less", "less_equal", "not_equal",
}  # fmt: skip
#: Known to mix tokens where the sequence is among their dimensions, and how.
_MIXES = {
    "conv1d": "convolves along the sequence",
    "convolution": "convolves along the sequence",
    "index_put": "writes rows among the tokens",
    "index_put_": "writes rows among the tokens",
    "nonzero": "picks tokens by what they are",
    "bincount": "counts tokens",
}
_CONTRACT = {"linear": (-1,), "mm": (-1,), "addmm": (-1,), "matmul": (-1,), "bmm": (-1,), "baddbmm": (-1,)}
_CONSTANT = {
    "full",
    "zeros",
    "ones",
    "empty",
    "scalar_tensor",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
}


def mixing_nodes(gm: GraphModule) -> list[tuple[Node, str]]:
    """Nodes not proved token-local, each with the reason; empty when a packed batch is safe.

    The gather of logits (index_select by ``logits_indices``) is the one place where tokens may be picked.
    """
    symbols = _token_symbols(gm)
    if not symbols:
        first = next(n for n in gm.graph.nodes if n.op == "placeholder")
        return [(first, "its batch and sequence length are fixed numbers, so tokens cannot be followed")]
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            reason = _why_not(node, symbols)
            if reason:
                found.append((node, reason))
    return found


def _token_symbols(gm: GraphModule) -> set[Any]:
    symbols: set[Any] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.target in ("input_ids", "position_ids", "rope_lengths"):
            val = node.meta.get("val")
            for d in getattr(val, "shape", ()):
                symbols |= _free(d)
    return symbols


def _free(d: Any) -> set[Any]:
    return set(d.node.expr.free_symbols) if isinstance(d, torch.SymInt) else set()


def _token_dims(node: Any, symbols: set[Any]) -> set[int]:
    val = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(val, torch.Tensor):
        return set()
    return {i for i, d in enumerate(val.shape) if _free(d) & symbols}


def _rank(node: Any) -> int:
    val = node.meta.get("val")
    return val.dim() if isinstance(val, torch.Tensor) else 0


def _why_not(node: Any, symbols: set[Any]) -> str | None:
    target = node.target
    if target in MIXERS:
        return None
    info = info_of(target)
    if info is not None:
        return None if info.token_local else f"{info.name} mixes tokens and has no cache descriptor"
    unknown = [a.name for a in node.all_input_nodes if a.op == "call_function" and a.meta.get("val") is None]
    if unknown:
        return f"reads {unknown[0]}, which has no value (meta['val']) to judge by"
    if not isinstance(target, torch._ops.OpOverload):
        # operator.getitem of several results, and arithmetic on sizes
        tokens = any(_token_dims(a, symbols) for a in node.all_input_nodes)
        return (
            f"{getattr(target, '__name__', target)} is not an operator that can be judged" if tokens else None
        )
    tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    name = target.name().split("::", 1)[1].split(".", 1)[0]
    if name.startswith("sym_") or name == "_assert_tensor_metadata":
        return None
    if name in _CONSTANT:
        return "makes a tensor that holds a size" if _fills_with_size(node) else None
    if target.namespace != "aten" and any(_token_dims(a, symbols) for a in tensors):
        return f"{target.name()} is not known to keep tokens apart"
    if name == "arange" and (_token_dims(node, symbols)):
        return "counts tokens by their place in the row (arange over the sequence), not by position_ids"
    if not any(_token_dims(a, symbols) for a in tensors):
        return None
    sized = [
        a for a in node.all_input_nodes if not isinstance(a.meta.get("val"), (torch.Tensor, tuple, list))
    ]
    if name in (
        "view",
        "reshape",
        "_unsafe_view",
        "view_as",
        "reshape_as",
        "flatten",
        "unflatten",
    ) and _scrambles(node, symbols):
        return "lays token and feature dimensions together anew"
    if name in _LAYOUT:
        if name in ("repeat", "repeat_interleave") and _repeats_tokens(node, symbols):
            return "repeats tokens"
        return None
    if torch.Tag.pointwise in target.tags or name in _ELEMENTWISE:
        return "computes with the number of tokens" if sized else None
    if name in ("embedding",):
        return None if not _token_dims(node.args[0], symbols) else "looks rows up among tokens"
    if name in _CONTRACT:
        return _contraction(node, name, symbols)
    if name in ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"):
        width = len(node.args[1])
        rank = _rank(node.args[0])
        touched = set(range(rank - width, rank)) & _token_dims(node.args[0], symbols)
        return "normalises over tokens" if touched else None
    if name == "index":
        return _index(node, symbols)
    if name in ("pad", "constant_pad_nd"):
        return _pad(node, symbols)
    if name in _MIXES:
        return _MIXES[name]
    if name in _ALONG_DIM:
        return _along(node, name, symbols)
    return f"{target.name()} is not known to keep tokens apart"


def _fills_with_size(node: Any) -> bool:
    """True when the value, not the shape, of a constant tensor is computed from a size."""
    names = ("fill_value", "s")
    values = [
        node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
        for i, a in enumerate(node.target._schema.arguments)
        if a.name in names
    ]
    return any(isinstance(v, Node) for v in values)


def _scrambles(node: Any, symbols: set[Any]) -> bool:
    """True when a view does not keep each token's elements together, in token order.

    Sizes are split into the smallest groups of equal product; a group may merge or split token dimensions, or
    feature dimensions, but when it holds both, tokens and features must keep their order and not be
    regrouped.
    """
    sizes = [
        tuple(sympy.sympify(d.node.expr if isinstance(d, torch.SymInt) else d) for d in n.meta["val"].shape)
        for n in (node.args[0], node)
    ]
    return _regroups(*sizes, frozenset(symbols))


@lru_cache(maxsize=1024)
def _regroups(before: tuple[Any, ...], after: tuple[Any, ...], symbols: frozenset[Any]) -> bool:
    a, b = [d for d in before if d != 1], [d for d in after if d != 1]
    while a or b:
        left, right = [a.pop(0)] if a else [], [b.pop(0)] if b else []
        while (ratio := sympy.cancel(sympy.prod(left) / sympy.prod(right))) != 1:
            side, rest = (left, a) if a and (ratio.as_numer_denom()[1] != 1 or not b) else (right, b)
            if not rest:
                return True
            side.append(rest.pop(0))
        tokens = [bool(d.free_symbols & symbols) for d in left]
        if any(tokens) and not all(tokens) and left != right:
            return True
    return False


def _repeats_tokens(node: Any, symbols: set[Any]) -> bool:
    before, after = _token_dims(node.args[0], symbols), _token_dims(node, symbols)
    return len(before) != len(after)


def _contraction(node: Any, name: str, symbols: set[Any]) -> str | None:
    a, b = (node.args[1], node.args[2]) if name in ("addmm", "baddbmm") else (node.args[0], node.args[1])
    da, db = _token_dims(a, symbols), _token_dims(b, symbols)
    ra, rb = _rank(a), _rank(b)
    if ra - 1 in da:
        return "contracts over tokens"
    if name == "linear":
        return None if not db else "its weight depends on tokens"
    if rb >= 2 and rb - 2 in db:
        return "contracts over tokens"
    if rb >= 2 and rb - 1 in db and ra >= 2 and ra - 2 in da:
        return "multiplies tokens with tokens"
    return None


def _index(node: Any, symbols: set[Any]) -> str | None:
    touched = {i for i, ix in enumerate(node.args[1]) if ix is not None}
    return "indexes along tokens" if touched & _token_dims(node.args[0], symbols) else None


def _pad(node: Any, symbols: set[Any]) -> str | None:
    """Padding comes in pairs, those of the last dimension first."""
    rank = _rank(node.args[0])
    touched = {rank - 1 - i // 2 for i, size in enumerate(node.args[1]) if size != 0}
    return "pads the sequence" if touched & _token_dims(node.args[0], symbols) else None


def _along(node: Any, name: str, symbols: set[Any]) -> str | None:
    source = node.args[0]
    many = isinstance(source, (list, tuple))
    inputs = [s for s in source if isinstance(s, Node)] if many else [source]
    dims = set().union(*(_token_dims(s, symbols) for s in inputs))
    rank = max(_rank(s) for s in inputs) + (name == "stack")
    schema = node.target._schema
    values = {
        a.name: (node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value))
        for i, a in enumerate(schema.arguments)
    }
    dim = values.get("dim", values.get("dims", 0 if name in ("cat", "stack", "slice", "select") else None))
    if name == "one_hot":
        return None
    if (
        name == "index_select"
        and isinstance(values.get("index"), Node)
        and values["index"].target == "logits_indices"
    ):
        return None
    given = [] if dim is None else dim if isinstance(dim, (list, tuple)) else [dim]
    along = {d % rank for d in given or range(rank)}  # no dimension named: all
    if name == "stack":
        dims = {d + (d >= min(along)) for d in dims}
    if name == "slice" and along & dims:
        start, end, step = values.get("start"), values.get("end"), values.get("step", 1)
        if start in (None, 0) and (end is None or (isinstance(end, int) and end >= 2**62)) and step == 1:
            return None
    if name in ("slice", "select") and along & dims and _first_row(node, along, values):
        return None
    if name in ("gather", "take_along_dim") and along & dims:
        return "picks among tokens"
    return f"works along tokens ({name} over dimension {sorted(along & dims)})" if along & dims else None


def _first_row(node: Any, along: set[int], values: dict[str, Any]) -> bool:
    """True for the first of the batch's rows: a packed batch has one row, so that is all of it."""
    rows = (
        next(n for n in node.graph.nodes if n.op == "placeholder" and n.target == "input_ids")
        .meta["val"]
        .shape[0]
    )
    sizes = [node.args[0].meta["val"].shape[d] for d in along]
    first = (
        values.get("index") == 0 if "index" in values else (values.get("start"), values.get("end")) == (0, 1)
    )
    return first and isinstance(rows, torch.SymInt) and all(str(d) == str(rows) for d in sizes)
