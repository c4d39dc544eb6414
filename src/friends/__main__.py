"""``python -m friends`` is the command ``friends``."""

from friends.cli import main

main()
