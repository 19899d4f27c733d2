"""``python -m detrojan`` is the command ``detrojan``, from a checkout that is not installed too."""

from detrojan.commands.cli import main

main()
