"""Ranks: processes that each run a part of the model, all on the same packed batches.

A reader's way through: ``start`` makes the ``processes``, each of which is a ``worker``: it meets the others
(``meeting``), builds its part, and runs steps (``rank``) that talk through a ``communicator``, whose sums are
made by one of the ``strategies``. The engine sees one device, the ``crew``, which tells the ranks what to do over
``link``s in ``messages``.
"""

from adkit.runtime.ranks.communicator import TorchCommunicator
from adkit.runtime.ranks.crew import Crew
from adkit.runtime.ranks.start import start_processes

__all__ = ["Crew", "TorchCommunicator", "start_processes"]
