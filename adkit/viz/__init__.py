"""Pictures of data: graphs as dot/SVG, tables, plots, widgets, standalone HTML. Imports ``adkit.graph`` only.

category, picture -> what a picture shows, as data; dot -> the picture drawn; plots -> figures over steps and
cost tables; mesh -> figures over ranks; html, times, placement -> adkit's objects in a notebook (importing this
package registers them); record -> the record of a walk, from which the explorer (explorer, page), compare and
export work; naming -> which node somebody means; anygraph -> diff and show for any FX graph; widgets -> a browser
of steps; live -> an engine at work: cache pages, batches, answers.
"""

from adkit.viz import html, placement, times
from adkit.viz.anygraph import diff, show
from adkit.viz.comparison import compare
from adkit.viz.dot import Drawing, draw, draw_rewrite
from adkit.viz.exports import export
from adkit.viz.page import write_page
from adkit.viz.picture import PictureTooLarge
from adkit.viz.record import Record, RecordError, load_record
from adkit.viz.record.overlays import overlay

__all__ = [
    "Drawing",
    "PictureTooLarge",
    "Record",
    "RecordError",
    "compare",
    "diff",
    "draw",
    "draw_rewrite",
    "export",
    "html",
    "load_record",
    "overlay",
    "placement",
    "show",
    "times",
    "write_page",
]
