"""``python -m cpodfs``."""

from cpodfs.cli import main

main()
