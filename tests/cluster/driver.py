"""``snakemake``, but it asks SLURM every second: the plugin waits longer each time that no job has ended."""

import signal

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

# A shell that starts tests in its background has them ignore Ctrl-C, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
Executor.next_seconds_between_status_checks = property(lambda self: 1.0, lambda self, seconds: None)
main()
