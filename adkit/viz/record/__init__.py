"""The record of a walk: one versioned JSON document that everything that is drawn is drawn from.

format -> its fields (``record.schema.json`` is made of them); walked -> graphs told by way of rows and splice, kept
while a walk goes on; write -> from that and the steps to a record; read -> from a file to a record, checked. See
``docs/record.md``.
"""

from adkit.viz.record.format import VERSION, Overlay, Record
from adkit.viz.record.read import RecordError, check_record, dump_record, load_record, parse_record
from adkit.viz.record.walked import Walked
from adkit.viz.record.write import RecordWriter

__all__ = [
    "VERSION",
    "Overlay",
    "Record",
    "RecordError",
    "RecordWriter",
    "Walked",
    "check_record",
    "dump_record",
    "load_record",
    "parse_record",
]
