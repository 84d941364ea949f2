"""Pictures of the graph on disk."""
