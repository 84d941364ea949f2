"""Fusions that need the weights, or the last word on the graph before caching."""
