"""What one runs beside the workflow, as ``detrojan NAME``: one file a command, and :mod:`cli`, which parses."""
