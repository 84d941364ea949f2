"""Ranks: processes that each run a part of the model, all on the same packed batches.

A reader's way through: ``start`` makes the ``processes``, each of which is a ``worker``: it meets the others
(``meeting``), builds its part, and runs steps (``rank``) that talk through a ``communicator``, whose sums are
made by one of the ``strategies``. The engine sees one device (``devices``); behind it a ``crew`` tells the ranks what
to do, in ``messages`` over ``link``s, and finds out who failed.
"""

from adkit.runtime.ranks.communicator import TorchCommunicator
from adkit.runtime.ranks.crew import Crew
from adkit.runtime.ranks.start import current_program, launched_ranks, leave, program, start_processes

__all__ = [
    "Crew",
    "TorchCommunicator",
    "current_program",
    "launched_ranks",
    "leave",
    "program",
    "start_processes",
]
