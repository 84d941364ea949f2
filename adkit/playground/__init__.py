"""Live generation in the notebook: a panel that runs the engine while the kernel stays free.

``panel`` is what a notebook holds (:class:`Playground`); ``driver`` runs the engine on a thread of its own, ``gauge``
measures, ``view`` turns all of it into the pictures of ``adkit.viz.live``, ``controls`` has the widgets.
"""

from adkit.playground.gauge import PlayStats
from adkit.playground.panel import Playground

__all__ = ["PlayStats", "Playground"]
