"""What one runs beside the workflow: ``python -m detrojan.commands.NAME``, one file a command."""
