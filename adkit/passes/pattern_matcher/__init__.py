"""Common blocks recognised and replaced by canonical ops."""
