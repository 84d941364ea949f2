"""``python -m adkit.viz.record``: write ``record.schema.json`` anew from the format."""

from adkit.viz.record.schema import PATH, schema_text

if __name__ == "__main__":
    PATH.write_text(schema_text())
    print(PATH.name)
