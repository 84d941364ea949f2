"""Pictures of data: graphs as dot/SVG, tables, plots, widgets, standalone HTML. Imports ``adkit.graph`` only.

category, picture -> what a picture shows, as data; dot -> the picture drawn; plots -> figures over steps and
cost tables; html, times -> adkit's objects in a notebook (importing this package registers them); report -> one
standalone file; widgets -> a browser of steps; live -> an engine at work: cache pages, batches, answers.
"""

from adkit.viz import html, times
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
    "times",
]
