"""``python -m adkit``."""

from adkit.cli import main

main()
