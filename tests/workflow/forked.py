"""Snakemake in forks of one process that has imported it, since a test's dry run is mostly imports."""

import atexit
import functools
import json
import subprocess
import tempfile
from pathlib import Path

from detrojan.workflow.fork_server import ForkServer

SCRIPT = Path(__file__).with_name("run_snakemake.py")
# Of Snakemake and of what the Snakefile imports, but nothing of ours: that is what tests edit.
MODULES = (
    *("snakemake.api", "snakemake.cli", "snakemake.workflow", "snakemake.dag", "snakemake.executors.local"),
    *("snakemake.scheduling.greedy", "snakemake.script", "pydantic", "yaml", "rich.console"),
)


@functools.cache
def _server():
    server = ForkServer(MODULES)
    atexit.register(server.close)
    return server


def snakemake(arguments, folder, environment):
    """Run ``python -m snakemake`` with these arguments; return its exit code and all that it said."""
    with tempfile.TemporaryDirectory() as own:
        said = Path(own, "said")
        request = {"arguments": list(map(str, arguments)), "folder": str(folder), "said": str(said)}
        code = _server().run(str(SCRIPT), {**environment, "REQUEST": json.dumps(request)})
        return subprocess.CompletedProcess(arguments, code, said.read_text())
