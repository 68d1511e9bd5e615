"""Run the ``atmc`` command, for ``python -m atmc``."""

from atmc.cli.main import main

main()
