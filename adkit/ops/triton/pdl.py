"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits inside.

Between two dependent kernels of a CUDA graph the device stands idle for about a microsecond, and then memory
takes another to answer. A kernel launched so is already in place when its predecessor ends, and may have
asked for what the predecessor does not write: its weights. The rules for a kernel:

- launch it with ``**launch()``, which also gives its constexpr ``PDL``;
- call ``wait(PDL)`` before reading anything that another kernel of the step writes (activations, caches, counters), and
  before any store: the buffer written may be one that the predecessor still reads;
- call ``release(PDL)`` as early as it likes: it only lets the next kernel's programs take free places.

After ``wait`` everything that all earlier kernels wrote is visible, because the predecessor waited too
before it ended. A kernel launched without ``launch()`` waits for its predecessor as always. Hopper and newer.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def wait(PDL: tl.constexpr):
    """Block until every earlier kernel's stores are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel start as soon as every program of this one has come here."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@lru_cache
def enabled() -> bool:
    """True where kernels overlap so: on Hopper and newer, unless ADKIT_PDL=0 or the interpreter runs them."""
    if triton.knobs.runtime.interpret or os.environ.get("ADKIT_PDL") == "0" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


def launch() -> dict[str, Any]:
    """Launch arguments of a kernel that has a constexpr ``PDL`` and keeps the rules above."""
    return {"PDL": True, "launch_pdl": True} if enabled() else {"PDL": False}
