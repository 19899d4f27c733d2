"""Runs ``detrojan`` in the process of the tests."""

import pytest

from detrojan.commands.cli import main


def exit_code(*arguments):
    """Run the command with these arguments, paths too; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code
