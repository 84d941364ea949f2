"""Clean-ups of what export leaves behind."""
