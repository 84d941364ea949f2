"""The graph made callable by the engine."""
