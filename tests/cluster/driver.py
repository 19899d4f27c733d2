"""``snakemake``, but it asks SLURM each second: the plugin waits ten more each time that no job has ended."""

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

Executor.next_seconds_between_status_checks = property(lambda self: 1.0, lambda self, seconds: None)
main()
