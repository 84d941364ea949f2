"""Hugging Face config -> module on meta -> checkpoint.

``resolve(model)`` gives the :class:`ModelFactory` of a bundled name, directory, hub id or config object.
"""

from adkit.models.bundled import bundled_names
from adkit.models.factory import LoadReport, ModelFactory
from adkit.models.memory import MemoryEstimate
from adkit.models.resolve import resolve

__all__ = ["LoadReport", "MemoryEstimate", "ModelFactory", "bundled_names", "resolve"]
