"""What one runs beside the workflow, as ``detrojan NAME``: a file a command, and ``cli``, which parses."""
