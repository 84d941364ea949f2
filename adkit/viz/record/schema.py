"""The format as JSON Schema (draft 2020-12), for readers in other languages; a test keeps the file current."""

from __future__ import annotations

import json
from pathlib import Path

from adkit.viz.record.format import Record

PATH = Path(__file__).with_name("record.schema.json")


def schema_text() -> str:
    """The text of ``record.schema.json``."""
    schema = Record.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "adkit record"}
    return json.dumps(schema, indent=1) + "\n"
