"""``python -m atmc`` is the ``atmc`` command."""

from atmc.cli.main import main

main()
