"""The model on the meta device."""
