"""Measurements: ``latency`` times decoding beside its peers and against the memory's own speed."""
