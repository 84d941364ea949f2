"""Triton kernels. ``ops`` defines the ops and imports no triton; the other modules hold kernels and launchers."""

from adkit.ops.triton import ops

__all__ = ["ops"]
