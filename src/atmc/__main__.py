"""``python -m atmc`` is the ``atmc`` command."""

from atmc.cli import main

main()
