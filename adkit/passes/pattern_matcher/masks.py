"""What a mask or bias in the graph means, found by looking at its values.

A mask arrives as a list of :class:`MaskStep`: what the graph does to the scores between the product of
queries and keys and the softmax. Composed on zero scores at several lengths they give a bias; its shape says
whether it is causal, a window, chunks, ALiBi, or a product of these. What is not one of them raises
:class:`NotUnderstood`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from adkit.graph.shape_only import EvaluationError, ShapeOnly
from adkit.ops.attention import allowed

#: Scores at or below this are masked: models write -inf, the dtype's least value, or -10000 (GPT-1, CTRL).
MASKED = -9999.0
_SMALL = ((2, 7), (1, 13))
_LONGEST = 8195


class NotUnderstood(Exception):
    """A mask or an attention that torch_attention cannot be proved to express; the message says why."""


@dataclass(frozen=True)
class MaskStep:
    """One operation on the scores: ``add`` operand * factor, ``multiply`` by operand, ``keep`` where operand
    is true (else ``fill``), ``fill`` where operand is true, ``scale`` by ``factor``, ``at_least`` ``factor``.

    ``rank`` is the number of dimensions of the scores at this point (3: batch and heads in one).
    """

    kind: Literal["add", "multiply", "keep", "fill", "scale", "at_least"]
    operand: Node | None = None
    factor: float = 1.0
    fill: Node | float = 0.0
    rank: int = 4


@dataclass(frozen=True)
class MaskMeaning:
    """A mask in the words of ``torch_attention``. ``slopes``: one ALiBi slope a head."""

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    slopes: tuple[float, ...] | None = None


@dataclass
class _Sample:
    rows: Tensor
    seq: int
    bias: Tensor  # [B or 1, N or 1, rows, S], float64


class MaskReader:
    """Reads masks of one graph, each distinct one once."""

    def __init__(self, shapes: ShapeOnly) -> None:
        self.shapes = shapes
        self._known: dict[Any, MaskMeaning | str] = {}

    def read(self, steps: tuple[MaskStep, ...], heads: int) -> MaskMeaning:
        """The meaning of ``steps`` (innermost first) for N = ``heads``; raises NotUnderstood."""
        key = (heads, *(self._key(s) for s in steps))
        if key not in self._known:
            try:
                self._known[key] = self._read(steps, heads)
            except (NotUnderstood, EvaluationError) as error:
                self._known[key] = str(error)
        found = self._known[key]
        if isinstance(found, str):
            raise NotUnderstood(found)
        return found

    def _key(self, step: MaskStep) -> Any:
        def of(x: Any) -> Any:
            return ("node", self.shapes.fingerprint(x)) if isinstance(x, Node) else x

        return step.kind, of(step.operand), step.factor, of(step.fill), step.rank

    def _read(self, steps: tuple[MaskStep, ...], heads: int) -> MaskMeaning:
        if not any(s.operand is not None for s in steps):
            return MaskMeaning(causal=False)
        samples = [self._sample(steps, heads, batch, seq) for batch, seq in _SMALL]
        long = self._long_sample(steps, heads)
        if long is not None:
            samples.append(long)
        return understand(samples)

    def _long_sample(self, steps: tuple[MaskStep, ...], heads: int) -> _Sample | None:
        """A few rows at a length beyond every constant in the mask, or the longest that the mask can take."""
        nodes = [x for s in steps for x in (s.operand, s.fill) if isinstance(x, Node)]
        marks = sorted({m for n in nodes for m in self.shapes.landmarks(n)})
        while marks:
            mark = marks[-1]
            for seq in (mark + 3, mark):
                if seq > _LONGEST:
                    raise NotUnderstood(f"the constant {mark} in it would need looking at {seq} positions")
                rows = sorted(
                    {r for m in marks for r in range(m - 2, m + 3) if r < seq} | {0, 1, 2, seq // 2, seq - 1}
                )
                try:
                    return self._sample(steps, heads, 1, seq, torch.tensor(rows))
                except EvaluationError:
                    continue
            marks.pop()
        return None

    def _sample(
        self, steps: tuple[MaskStep, ...], heads: int, batch: int, seq: int, rows: Tensor | None = None
    ) -> _Sample:
        rows = torch.arange(seq) if rows is None else rows
        at: dict[Node, Tensor] = {}

        def operand(x: Node | float | None, rank: int) -> Tensor:
            if not isinstance(x, Node):
                return torch.tensor(float(x or 0), dtype=torch.float64)
            if x not in at:
                at[x] = torch.as_tensor(self.shapes.value(x, batch, seq))
            return _as_scores(at[x], rank, batch, heads, seq, rows)

        zero = torch.zeros(batch, 1, len(rows), seq, dtype=torch.float64)
        bias = compose(steps, zero, operand)
        slope = compose(steps, zero + 1, operand) - bias
        factor = 1.0
        for s in steps:
            factor *= s.factor if s.kind == "scale" else 1.0
        seen = bias > MASKED
        if not torch.allclose(slope[seen], torch.full_like(slope[seen], factor), rtol=1e-4, atol=1e-6):
            raise NotUnderstood("it does more than add to scores or hide them")
        return _Sample(rows, seq, bias)


def compose(steps: tuple[MaskStep, ...], scores: Tensor, operand: Any) -> Tensor:
    """``scores`` [B, N, rows, S] after ``steps``; ``operand(x, rank)`` gives an operand's value."""
    for s in steps:
        if s.kind == "scale":
            scores = scores * s.factor
        elif s.kind == "at_least":
            scores = scores.clamp(min=s.factor)
        elif s.kind == "add":
            scores = scores + operand(s.operand, s.rank).double() * s.factor
        elif s.kind == "multiply":
            scores = scores * operand(s.operand, s.rank).double()
        else:
            hidden = operand(s.operand, s.rank).bool()
            hidden = ~hidden if s.kind == "keep" else hidden
            scores = torch.where(hidden, operand(s.fill, s.rank).double(), scores)
    return scores


def _as_scores(x: Tensor, rank: int, batch: int, heads: int, seq: int, rows: Tensor) -> Tensor:
    """An operand of scores of ``rank`` dimensions, as [B or 1, N or 1, rows or 1, S or 1]."""
    if x.ndim > rank:
        raise NotUnderstood(f"an operand has {x.ndim} dimensions, the scores {rank}")
    x = x.reshape((1,) * (rank - x.ndim) + tuple(x.shape))
    if rank == 3:
        x = x.reshape(batch, heads, *x.shape[1:]) if x.shape[0] == batch * heads else x.unsqueeze(1)
    if x.ndim != 4 or x.shape[-1] not in (1, seq) or x.shape[-2] not in (1, seq):
        raise EvaluationError(f"an operand of shape {tuple(x.shape)} does not fit scores of length {seq}")
    return x.index_select(-2, rows) if x.shape[-2] == seq else x


def understand(samples: list[_Sample]) -> MaskMeaning:
    """The meaning that fits every sample; raises NotUnderstood."""
    starts: dict[int, int] = {}
    causal = True
    for s in samples:
        seen = s.bias > MASKED
        if not (seen == seen[:1, :1]).all():
            raise NotUnderstood("it differs between sequences or heads")
        if not seen.any(-1).all():
            raise NotUnderstood("it hides every key of some token")
        seen = seen[0, 0]
        causal = causal and not bool((seen & (torch.arange(s.seq) > s.rows[:, None])).any())
        first = seen.int().argmax(-1)
        starts.update(zip(s.rows.tolist(), first.tolist(), strict=True))
    cut = {row: start for row, start in starts.items() if start > 0}
    windows = [None] if not cut else [None, max(row - start + 1 for row, start in cut.items())]
    fresh = [row for row, start in cut.items() if start == row]  # rows where a chunk may begin
    chunks = [None] if not fresh else [None, min(fresh)]
    for window in windows:
        for chunk in chunks:
            if all(_fits(s, causal, window, chunk) for s in samples):
                return MaskMeaning(causal, window, chunk, _slopes(samples))
    raise NotUnderstood("it is no combination of causal, window and chunk")


def _fits(s: _Sample, causal: bool, window: int | None, chunk: int | None) -> bool:
    return torch.equal(allowed(s.rows, torch.arange(s.seq), causal, window, chunk), s.bias[0, 0] > MASKED)


def _slopes(samples: list[_Sample]) -> tuple[float, ...] | None:
    """ALiBi slopes of the additive part, or None (softmax ignores what is the same for all keys of a row)."""
    best = max(samples, key=lambda s: s.seq)
    seen = (best.bias[0, :1] > MASKED)[0]
    if all(bool((s.bias[s.bias > MASKED].abs() < 1e-6).all()) for s in samples):
        return None
    row = int(seen.sum(-1).argmax())
    keys = seen[row].nonzero()[:, 0]
    span = int(keys[-1] - keys[0])
    values = best.bias[0, :, row]
    slopes = (values[:, keys[-1]] - values[:, keys[0]]) / max(span, 1)
    for s in samples:
        distance = (torch.arange(s.seq)[None, :] - s.rows[:, None]).double()
        wanted = slopes[:, None, None] * distance
        rest = torch.where(s.bias > MASKED, s.bias - wanted, torch.zeros(()))
        shift = torch.gather(rest, -1, (s.bias > MASKED).int().argmax(-1, keepdim=True))
        off = torch.where(s.bias > MASKED, rest - shift, torch.zeros(()))
        if bool((off.abs() > 1e-4 * (1 + wanted.abs())).any()):
            raise NotUnderstood("its bias is not ALiBi (a slope a head times the distance)")
    if not slopes.abs().max() > 1e-9:
        return None
    return tuple(float(torch.tensor(x, dtype=torch.float32)) for x in slopes.tolist())
