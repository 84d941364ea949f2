"""Pictures of data: graphs as dot/SVG, tables, plots, widgets, standalone HTML. Imports ``adkit.graph`` only."""
