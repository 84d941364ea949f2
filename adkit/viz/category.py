"""What kind of work a node does, and its colours: fills light enough for dark text on any page."""

from __future__ import annotations

import re
from functools import lru_cache

import torch

from adkit.graph.code import op_text
from adkit.graph.snapshot import NodeRecord

# category -> (fill, border); hues after Okabe & Ito's colour-blind-safe palette, lightened
COLOURS: dict[str, tuple[str, str]] = {
    "input/output": ("#e3e6ea", "#7b8794"),
    "embedding": ("#e9dcf5", "#8a5fb0"),
    "norm": ("#fdf0b6", "#b8960c"),
    "linear": ("#cfe4f7", "#2f7dbd"),
    "rope": ("#fcdcc2", "#c96a1b"),
    "attention": ("#f9cfd9", "#c2395f"),
    "cache": ("#f3d6ec", "#a3488f"),
    "mlp": ("#cdeee1", "#12805c"),
    "moe": ("#dbeab8", "#64801a"),
    "mixer": ("#f5d6d0", "#b04a35"),
    "communication": ("#d4d4f7", "#5555b5"),
    "elementwise": ("#e4f3f5", "#4a95a0"),
    "view": ("#f1f1ee", "#a3a39b"),
    "shape": ("#f7f7f7", "#bdbdbd"),
}

# first hit wins; names are op_text: short, without namespace and overload
_RULES = [
    ("communication", re.compile(r"all_(reduce|gather|to_all)|reduce_scatter|^wait_tensor|broadcast_|dist_")),
    ("cache", re.compile(r"cache|prepare_.*metadata|page")),
    ("attention", re.compile(r"attention|sdpa|^torch_mla|_mla|flex_att")),
    ("rope", re.compile(r"rope|rotary")),
    ("norm", re.compile(r"norm")),
    ("moe", re.compile(r"moe|grouped_mm|router|topk|histc")),
    ("mixer", re.compile(r"ssm|conv1d|delta_rule|mamba|scan")),
    ("mlp", re.compile(r"swiglu|geglu|glu")),
    ("linear", re.compile(r"linear|matmul|^(b|add)?mm$|gemm|einsum|dot")),
    ("embedding", re.compile(r"^embedding")),
    ("shape", re.compile(r"^sym_|_assert|^(item|_local_scalar_dense)$")),
    ("view", re.compile(
        r"^(view|_unsafe_view|reshape|transpose|permute|t|unsqueeze|squeeze|expand|expand_as|slice|select|cat|stack|split|"
        r"split_with_sizes|chunk|unbind|getitem|contiguous|flatten|unflatten|narrow|repeat|repeat_interleave|clone|detach|"
        r"alias|lift_fresh_copy|index|index_select|gather|movedim|arange|empty_like)$")),
]  # fmt: skip


_MODULES = [
    ("norm", re.compile(r"norm|^ln_|^ln\d")),
    ("rope", re.compile(r"rotary|rope")),
    ("attention", re.compile(r"attn|attention")),
    ("moe", re.compile(r"moe|experts|router")),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|^act|activation")),
    ("embedding", re.compile(r"embed|wte|wpe")),
    ("mixer", re.compile(r"mamba|conv|ssm|delta")),
]


def category_of_module(path: str) -> str:
    """The category that a module's own name tells, or empty."""
    return _first(path.rsplit(".", 1)[-1], modules=True)


@lru_cache(maxsize=1 << 12)  # asked of every node, of a few names
def _first(name: str, *, modules: bool) -> str:
    return next((category for category, rule in (_MODULES if modules else _RULES) if rule.search(name)), "")


def category_of(n: NodeRecord) -> str:
    """The category of a node, a key of :data:`COLOURS`: by its op, and for plain arithmetic by its module."""
    if n.op in ("placeholder", "output"):
        return "cache" if n.op == "placeholder" and "cache" in n.target_name else "input/output"
    name = n.module_type.lower() if n.op == "call_module" else op_text(n)
    told = _first(name, modules=False)
    if told:
        return told
    if n.val is not None and not isinstance(n.val, (torch.Tensor, tuple, list)):
        return "shape"
    part = category_of_module(n.module_path)
    return part if part in ("norm", "rope", "mlp") else "elementwise"
