"""Hugging Face config -> module on meta -> checkpoint."""
