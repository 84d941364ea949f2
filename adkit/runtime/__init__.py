"""The runtime: what turns a compiled graph into generated text.

A reader's way through: ``live`` (prompts and answers) drives ``engine`` (the loop), each step of which asks
``scheduler`` what runs and ``pages`` where it is cached, and has ``launch`` start it: packed with ``batch``,
its logits handed to ``sampler``, all without waiting for the device. A request's state is a ``sequence``; its
text comes from a ``detokenizer``; ``stats`` counts.
"""

from adkit.runtime.engine import Engine
from adkit.runtime.live import LiveModel
from adkit.runtime.pages import PageAllocator
from adkit.runtime.sequence import Sequence
from adkit.runtime.stats import EngineStats

__all__ = ["Engine", "EngineStats", "LiveModel", "PageAllocator", "Sequence"]
