"""Weights read onto the device."""
