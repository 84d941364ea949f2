"""What the attention matchers share: known constants, the proof of a match, putting the canonical op in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from adkit.graph.edit import fake_mode_of
from adkit.graph.provenance import source_of
from adkit.graph.shape_only import EvaluationError, ShapeOnly
from adkit.graph.snapshot import attribute
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass
from adkit.passes.pattern_matcher.masks import MaskMeaning, NotUnderstood
from adkit.passes.pattern_matcher.scores import Found, with_asserts

aten = torch.ops.aten
ATTENTION = torch.ops.adkit.torch_attention.default
REPEAT_KV = torch.ops.adkit.torch_attention_repeat_kv.default
_PROOF_SIZE = (2, 7)


def attention_options(
    mask: MaskMeaning, *, scale: float | None, softcap: float | None = None, layout: str = "bnsd"
) -> dict[str, Any]:
    """Keyword arguments of ``torch_attention``; what has its default value is left out."""
    options: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "window": mask.window,
        "chunk": mask.chunk,
    }
    options = {k: v for k, v in options.items() if v is not None}
    if not mask.causal:
        options["is_causal"] = False
    if layout != "bsnd":
        options["layout"] = layout
    return options


def known_buffers(gm: GraphModule, ctx: Context) -> dict[str, Tensor]:
    """Data of the buffers that a model on meta computes when it is really built: causal tables, slopes.

    The factory rebuilds them on the CPU; buffers that a checkpoint holds are not among them.
    """
    computed: frozenset[str] = getattr(ctx.factory, "computed", frozenset())
    lacking = {
        n.target
        for n in gm.graph.nodes
        if n.op == "get_attr"
        and n.target in computed
        and (t := attribute(gm, n.target)) is not None
        and t.is_meta
    }
    # what is computed needs no weights, so a factory without them can still make it
    return (
        dict(ctx.factory.with_random_weights().load(sorted(lacking), torch.device("cpu"))) if lacking else {}
    )


@dataclass
class Replacer:
    """Replaces found attentions by ``torch_attention`` (layout bnsd), each proved on numbers first.

    The proof runs the matched nodes and the canonical op on the same small random tensors, once for every
    distinct way of writing attention in the graph.
    """

    owner: Pass
    gm: GraphModule
    shapes: ShapeOnly
    label: str
    matches: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    _proved: dict[Any, str] = field(default_factory=dict)
    _slopes: dict[tuple[float, ...], str] = field(default_factory=dict)

    def replace(self, found: Found) -> None:
        """Put the canonical op in; raises NotUnderstood if the proof fails."""
        options = attention_options(found.mask, scale=found.scale, softcap=found.softcap)
        self._prove(found, options)
        with self.owner.site(self.gm, with_asserts(found.nodes), label=self.label, before=found.output) as s:
            key = s.call(aten.transpose.int, (found.key, -2, -1)) if found.key_swap else found.key
            slopes = None
            if found.mask.slopes is not None:
                path = self._slopes_path(found.mask.slopes)
                slopes = s.get_attr(path, val=self._fake(getattr(self.gm, path)))
                slopes.meta["adkit_constant"] = True
            args: tuple[Any, ...] = (found.query, key, found.value, None, found.sinks, slopes)
            while args[-1] is None:
                args = args[:-1]
            new = s.call(ATTENTION, args, options)
            dtype = found.output.meta["val"].dtype
            if new.meta["val"].dtype != dtype:
                new = s.call(aten.to.dtype, (new, dtype))
            s.replace(found.output, new)
        self.matches += 1

    def refuse(self, node: Node, reason: str) -> None:
        """Note why an attention stays as it is."""
        self.refused[f"{source_of(node.meta.get('stack_trace')) or node.name}: {reason}"] += 1

    def info(self) -> PassInfo:
        """What was done."""
        details = {"not matched": dict(self.refused)} if self.refused else {}
        return PassInfo(num_matches=self.matches, is_clean=False, details=details)

    def _slopes_path(self, slopes: tuple[float, ...]) -> str:
        if slopes not in self._slopes:
            used = set(self._slopes.values())
            name = next(
                n for i in range(10**6) if (n := f"alibi_slopes_{i}") not in used and not hasattr(self.gm, n)
            )
            self.gm.register_buffer(name, torch.tensor(slopes, dtype=torch.float32), persistent=False)
            self._slopes[slopes] = name
        return self._slopes[slopes]

    def _fake(self, tensor: Tensor) -> Tensor:
        mode = fake_mode_of(self.gm)
        if mode is None:
            return tensor.to("meta")
        fake: Tensor = mode.from_tensor(tensor)
        return fake

    def _prove(self, found: Found, options: dict[str, Any]) -> None:
        given = [n for n in (found.query, found.key, found.value, found.sinks) if n is not None]
        key = (self.shapes.fingerprint(found.output, given), str(options), found.mask, found.key_swap)
        if key not in self._proved:
            self._proved[key] = self._disagreement(found, given, options)
        if self._proved[key]:
            raise NotUnderstood(self._proved[key])

    def _disagreement(self, found: Found, given: list[Node], options: dict[str, Any]) -> str:
        generator = torch.Generator().manual_seed(0)
        batch, seq = _PROOF_SIZE
        try:
            tensors = {n: torch.randn(self.shapes.shape(n, batch, seq), generator=generator) for n in given}
            expected = self.shapes.value(found.output, batch, seq, tensors)
        except EvaluationError as error:
            return str(error)
        key = tensors[found.key].transpose(-1, -2) if found.key_swap else tensors[found.key]
        sinks = None if found.sinks is None else tensors[found.sinks]
        slopes = None if found.mask.slopes is None else torch.tensor(found.mask.slopes)
        got = torch.ops.adkit.torch_attention(
            tensors[found.query], key, tensors[found.value], None, sinks, slopes, **options
        )
        if got.shape != expected.shape or not torch.allclose(
            got, expected.to(got.dtype), rtol=1e-3, atol=1e-4
        ):
            return "what was recognised does not compute the same numbers"
        return ""
