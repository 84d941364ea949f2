"""The batch packed, token mixers given their caches."""
