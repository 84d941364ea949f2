"""From one graph to a rank's: what is cut is decided, written down as hints, and done."""
