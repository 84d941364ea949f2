"""Pictures of data: graphs as dot/SVG, tables, plots, widgets, standalone HTML. Imports ``adkit.graph`` only.

category, picture -> what a picture shows, as data; dot -> the picture drawn; plots -> figures over steps and
cost tables; html -> adkit's objects in a notebook (importing this package registers it); report -> one
standalone file; widgets -> a browser of steps.
"""

from adkit.viz import html
from adkit.viz.dot import Drawing, draw, draw_rewrite
from adkit.viz.picture import PictureTooLarge
from adkit.viz.record import Record, RecordError, load_record
from adkit.viz.record.overlays import overlay

__all__ = [
    "Drawing",
    "PictureTooLarge",
    "Record",
    "RecordError",
    "draw",
    "draw_rewrite",
    "html",
    "load_record",
    "overlay",
]
