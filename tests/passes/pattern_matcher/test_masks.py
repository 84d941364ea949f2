"""Masks are understood by their values, however they are written; unknown kinds are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adkit.graph.shape_only import ShapeOnly
from adkit.passes.pattern_matcher.masks import MaskMeaning, MaskReader, MaskStep, NotUnderstood

HEADS = 4


def grid(s: Any) -> tuple[Tensor, Tensor]:
    return torch.arange(s)[:, None], torch.arange(s)[None, :]


def read(mask: Callable[[Any], Tensor], kind: str = "keep", **more: Any) -> MaskMeaning:
    """The meaning of the mask that ``mask(s)`` computes, exported as part of a graph."""

    class Model(nn.Module):
        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            return (mask(input_ids.shape[1]),)

    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Model(),
        (),
        {"input_ids": torch.zeros(2, 6, dtype=torch.long)},
        dynamic_shapes={"input_ids": dims},
        strict=False,
    )
    gm = program.module(check_guards=False)
    node = next(n for n in gm.graph.nodes if n.op == "output").args[0][0]
    fill = float("-inf") if kind in ("keep", "fill") else 0.0
    return MaskReader(ShapeOnly(gm)).read((MaskStep(kind, node, fill=fill, **more),), HEADS)  # type: ignore[arg-type]


def compare(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Tensor]:
    return lambda s: f(*grid(s))


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (compare(lambda q, k: k <= q), MaskMeaning()),
        (compare(lambda q, k: (k <= q) & (q - k < 5)), MaskMeaning(window=5)),
        (compare(lambda q, k: (k <= q) & (k > q - 4096)), MaskMeaning(window=4096)),
        (compare(lambda q, k: (k <= q) & (q // 4 == k // 4)), MaskMeaning(chunk=4)),
        (compare(lambda q, k: (k <= q) & (q // 8 == k // 8) & (q - k < 3)), MaskMeaning(window=3, chunk=8)),
        (compare(lambda q, k: (k <= q) | (k > q)), MaskMeaning(causal=False)),
        (compare(lambda q, k: (q - k).abs() < 3), MaskMeaning(causal=False, window=3)),
        (lambda s: torch.ones(s, s).tril().bool(), MaskMeaning()),
    ],
)
def test_boolean_masks(mask: Callable[[Any], Tensor], wanted: MaskMeaning) -> None:
    assert read(mask) == wanted


def test_additive_masks_with_any_low_number() -> None:
    for low in (float("-inf"), torch.finfo(torch.bfloat16).min, -1e4):
        assert read(lambda s, low=low: torch.full((s, s), low).triu(1), "add") == MaskMeaning()


def slopes_of(s: Any) -> Tensor:
    return torch.arange(1, HEADS + 1)[:, None, None] / 8 * torch.arange(s)


def test_alibi_whatever_its_origin() -> None:
    """Softmax does not see what is added to a whole row: slope * k and slope * (k - q) are one."""
    wanted = MaskMeaning(slopes=tuple(h / 8 for h in range(1, HEADS + 1)))

    def causal(s: Any) -> Tensor:
        return torch.full((s, s), float("-inf")).triu(1)

    assert read(lambda s: slopes_of(s) + causal(s), "add") == wanted
    assert read(lambda s: slopes_of(s) - slopes_of(s).transpose(1, 2) + causal(s), "add") == wanted
    assert read(lambda s: slopes_of(s) - s + causal(s), "add") == wanted


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (compare(lambda q, k: (k <= q) & (k % 2 == 0)), "keep"),  # strided
        (compare(lambda q, k: (k <= q) | (k < 3)), "keep"),  # prefix
        (compare(lambda q, k: k < q), "keep"),  # the first token sees nothing
        (compare(lambda q, k: -((q - k) ** 2) / 10.0), "add"),  # not linear
        (compare(lambda q, k: (k <= q) + 0.5), "multiply"),  # scores are changed, not hidden
        (compare(lambda q, k: (k <= q) & (k > q - 100_000)), "keep"),  # a window too long to look at
    ],
)
def test_what_is_none_of_these_is_refused(mask: Callable[[Any], Tensor], kind: str) -> None:
    with pytest.raises(NotUnderstood):
        read(mask, kind)


def test_a_mask_that_differs_between_heads_is_refused() -> None:
    def mask(s: Any) -> Tensor:
        q, k = grid(s)
        return (k <= q) & (q - k < torch.arange(2, 2 + HEADS)[:, None, None])

    with pytest.raises(NotUnderstood, match="heads"):
        read(mask)
