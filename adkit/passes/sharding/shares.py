"""Arithmetic of shares: which elements of a dimension each rank holds, and why it cannot be so."""

from __future__ import annotations

from collections.abc import Sequence

from adkit.contract import ShardingError

#: One rank's half-open ranges [start, stop) along a dimension.
Ranges = tuple[tuple[int, int], ...]


def shares(
    size: int,
    world: int,
    *,
    blocks: Sequence[int] | None = None,
    unit: int = 1,
    copies: bool = True,
    what: str,
) -> tuple[Ranges, ...]:
    """What each of ``world`` ranks holds of a dimension of ``size`` elements: one entry a rank.

    Each of the ``blocks`` (default: all is one) is cut by itself; a piece is a whole number of ``unit`` elements (a
    head). With more ranks than units each unit is held by world / units neighbouring ranks, where ``copies`` allows it.
    Raises ShardingError for numbers that do not divide; ``what`` names what is cut.
    """
    parts = [int(b) for b in blocks] if blocks else [size]
    if sum(parts) != size:
        raise ShardingError(
            f"{what} has {size} elements, but its output_sizes {parts} add up to {sum(parts)}: "
            "the hint must list every block"
        )
    if not all(_divides(n, world, unit, copies) for n in parts):
        raise ShardingError(_why_not(parts, world, unit, copies, what))
    found: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    start = 0
    for n in parts:
        width = local_size(n, world, unit=unit, what=what)
        holders = world * width // n  # ranks that hold the same piece
        for rank in range(world):
            first = start + rank // holders * width
            found[rank].append((first, first + width))
        start += n
    return tuple(tuple(r) for r in found)


def local_size(size: int, world: int, *, unit: int = 1, what: str) -> int:
    """Elements of ``size`` that one rank holds; as :func:`shares`."""
    if not _divides(size, world, unit, True):
        raise ShardingError(_why_not([size], world, unit, True, what))
    return max(size // world, unit)


def _divides(size: int, world: int, unit: int, copies: bool) -> bool:
    if unit < 1 or size % unit or not size:
        return False
    units = size // unit
    return units % world == 0 or (copies and world % units == 0)


def _why_not(parts: list[int], world: int, unit: int, copies: bool, what: str) -> str:
    """Numbers, what is wrong with them, ranks that would do, and the way out."""
    odd = next(n for n in parts if not _divides(n, world, unit, copies))
    block = f" (block {parts.index(odd)} of {parts})" if len(parts) > 1 else ""
    if unit < 1 or odd % unit or not odd:
        return (
            f"{what}: {odd} elements{block} are not a whole number of pieces of {unit} "
            "(tp_min_local_shape): correct the hint, or leave the layer whole"
        )
    count = f"{odd // unit} pieces of {unit} elements" if unit > 1 else f"{odd} elements"
    fine = [w for w in range(1, 2 * world + 1) if all(_divides(n, w, unit, copies) for n in parts)]
    return (
        f"{what}: {count}{block} cannot be shared by {world} ranks equally; {', '.join(map(str, fine))} "
        f"{'rank' if fine == [1] else 'ranks'} would do: choose such a number, or leave the layer whole "
        "(a plan's edit(..., 'whole'), or shard_layers without its layer_type)"
    )
