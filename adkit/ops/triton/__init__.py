"""Triton kernels: ``ops`` defines the ops and imports no triton, the others hold kernels and launchers."""

from adkit.ops.triton import ops

__all__ = ["ops"]
