"""The record of a walk: one versioned JSON document that everything that is drawn is drawn from.

format -> its fields (``record.schema.json`` is made of them); write -> from steps to a record, by way of rows and
splice; read -> from a file to a record, checked. See ``docs/record.md``.
"""

from adkit.viz.record.format import VERSION, Overlay, Record
from adkit.viz.record.read import RecordError, check_record, dump_record, load_record, parse_record
from adkit.viz.record.write import RecordWriter

__all__ = [
    "VERSION",
    "Overlay",
    "Record",
    "RecordError",
    "RecordWriter",
    "check_record",
    "dump_record",
    "load_record",
    "parse_record",
]
