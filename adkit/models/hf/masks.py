"""What an attention mask means: a descriptor worked out from Hugging Face's index-based mask function.

Hugging Face describes a mask as ``f(batch, head, q_idx, kv_idx) -> bool`` and hands it to the mask interface.
Here ``f`` is evaluated on index grids; the causal, window and chunk it shows are proposed, then checked
against :func:`adkit.ops.attention.allowed` at every point of a small grid and at random and boundary points
over all positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from adkit.contract import ExportError

_GRID = 192
_SAMPLES = 4096


class MaskUsedAsTensor(ExportError):
    """The model's own code computes with its mask, so the mask stays in the graph as that code."""


@dataclass(frozen=True)
class MaskDescriptor:
    """A mask as ``torch_attention`` takes it; ``problem`` says why it is not understood.

    It goes through the model where a mask tensor would; code that computes with it gets
    :class:`MaskUsedAsTensor`.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    problem: str | None = None

    def _refuse(self, what: str) -> MaskUsedAsTensor:
        return MaskUsedAsTensor(f"the model's own code uses its attention mask as a tensor ({what})")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__add__":
            raise AttributeError(name)
        raise self._refuse(f".{name}")

    def __getitem__(self, index: Any) -> Any:
        raise self._refuse("indexing")

    def _operate(self, *other: Any) -> Any:
        raise self._refuse("arithmetic")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _operate
    __and__ = __rand__ = __or__ = __ror__ = __invert__ = __neg__ = __lt__ = __gt__ = __le__ = __ge__ = (
        _operate
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise MaskUsedAsTensor(
            f"the model's own code uses its attention mask as a tensor ({getattr(func, '__name__', func)})"
        )


Evaluate = Callable[[Tensor, Tensor], Tensor]


def describe(mask_function: Callable[..., Any], *, positions: int, heads: int = 1) -> MaskDescriptor:
    """The descriptor of a Hugging Face mask function, proved on positions below ``positions``.

    A window or chunk of at least ``positions`` cannot be told from none. Returns a descriptor with
    ``problem`` set where the function cannot be evaluated, depends on the head, or is no causal/window/chunk
    mask.
    """

    def evaluate(q: Tensor, k: Tensor, head: int = 0) -> Tensor:
        out = mask_function(torch.zeros((), dtype=torch.long), torch.tensor(head), q, k)
        if not isinstance(out, Tensor) or isinstance(out, FakeTensor) or out.is_meta:
            raise TypeError("it depends on data of the batch")
        return out.bool().expand(torch.broadcast_shapes(q.shape, k.shape))

    with _disable_current_modes(), torch._C.DisableTorchFunction():
        try:
            found = _propose(evaluate, positions)
            wrong = _counterexample(evaluate, found, positions, heads)
        except MaskUsedAsTensor:
            raise
        except Exception as error:
            return MaskDescriptor(problem=f"its mask function cannot be evaluated: {error}")
    if wrong is not None:
        return MaskDescriptor(
            problem="its mask is no combination of causal, window and chunk "
            f"(it differs at query {wrong[0]}, key {wrong[1]})"
        )
    return found


def _first_false(values: Tensor) -> int | None:
    where = (~values).nonzero()
    return int(where[0]) if where.numel() else None


def _propose(evaluate: Evaluate, positions: int) -> MaskDescriptor:
    """Read causal, chunk and window off a few long rows and diagonals."""
    far = torch.arange(positions)
    zero = torch.zeros((), dtype=torch.long)
    causal = not bool(evaluate(zero, torch.ones((), dtype=torch.long)))
    # The key before the query is hidden from every query when the window is 1, else only at a chunk's start.
    broken = _first_false(evaluate(far[1:], far[:-1]))
    chunk = None if broken is None or broken == 0 else broken + 1
    row = (chunk or positions) - 1
    window = _first_false(evaluate(torch.tensor(row), row - far[: row + 1]))
    return MaskDescriptor(causal, window, chunk)


def _counterexample(
    evaluate: Callable[..., Tensor], mask: MaskDescriptor, positions: int, heads: int
) -> tuple[int, int] | None:
    """A (query, key) where ``mask`` and the function differ, or None."""

    def expected(q: Tensor, k: Tensor) -> Tensor:
        ok = torch.ones(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool)
        if mask.causal:
            ok &= k <= q
        if mask.window is not None:
            ok &= q - k < mask.window
            if not mask.causal:
                ok &= k - q < mask.window
        if mask.chunk is not None:
            ok &= q // mask.chunk == k // mask.chunk
        return ok

    grid = torch.arange(min(_GRID, positions))
    pairs = [(grid[:, None], grid[None, :])]
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(positions, (_SAMPLES,), generator=generator)
    pairs.append((q, torch.randint(positions, (_SAMPLES,), generator=generator)))
    edges = [0, 1, -1] + [
        s * (size + d) for size in (mask.window, mask.chunk) if size for s in (1, -1) for d in (-1, 0, 1)
    ]
    pairs.append((q[:, None], (q[:, None] - torch.tensor(edges)).clamp(0, positions - 1)))
    if mask.chunk:
        start = q // mask.chunk * mask.chunk
        near = start[:, None] + torch.tensor([-1, 0, 1, mask.chunk - 1, mask.chunk])
        pairs.append((q[:, None], near.clamp(0, positions - 1)))
    for head in {0, heads - 1, heads // 2}:
        for q_idx, k_idx in pairs:
            differ = evaluate(q_idx, k_idx, head) != expected(q_idx, k_idx)
            if differ.any():
                at = tuple(differ.nonzero()[0].tolist())
                shape = differ.shape
                return int(q_idx.expand(shape)[at]), int(k_idx.expand(shape)[at])
    return None


def mask_interface(
    *args: Any,
    mask_function: Callable[..., Any],
    attention_mask: Any = None,
    config: Any = None,
    **kwargs: Any,
) -> MaskDescriptor:
    """Hugging Face's mask interface: the descriptor in place of a tensor."""
    if attention_mask is not None and not known_ones(attention_mask):
        return MaskDescriptor(problem="it has a padding mask whose content is not known while exporting")
    for name in ("q_offset", "kv_offset"):
        offset = kwargs.get(name, 0)
        if not isinstance(offset, int) or offset != 0:
            return MaskDescriptor(problem=f"it is built for a cache ({name} is not 0)")
    length = getattr(config, "max_position_embeddings", None) or 0
    heads = getattr(config, "num_attention_heads", None) or 1
    return describe(
        mask_function,
        positions=max(2 * length, 1 << 17),
        heads=heads if isinstance(heads, int) else max(heads),
    )


class KnownOnes(torch.overrides.TorchFunctionMode):
    """Remembers which tensors are all ones by construction: models make such padding masks themselves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("ones", "ones_like") or (name in _KEEPING and args and known_ones(args[0])):
            out._adkit_ones = True
        return out


_KEEPING = frozenset(
    {"to", "bool", "long", "int", "float", "view", "reshape", "expand", "contiguous", "clone"}
)


def known_ones(value: Any) -> bool:
    """Whether :class:`KnownOnes` saw this tensor made as ones."""
    return isinstance(value, Tensor) and getattr(value, "_adkit_ones", False)
