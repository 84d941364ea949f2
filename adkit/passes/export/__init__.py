"""The module captured as a flat ATen graph."""
