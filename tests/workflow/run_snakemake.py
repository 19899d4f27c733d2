"""Becomes ``python -m snakemake`` in a process that was forked; see :mod:`tests.workflow.forked`."""

import json
import os
import sys

request = json.loads(os.environ.pop("REQUEST"))
os.chdir(request["folder"])
said = os.open(request["said"], os.O_WRONLY | os.O_CREAT)
for stream in (1, 2):
    os.dup2(said, stream)
os.close(said)
# The fork server is ours; the code under test is another copy of the package.
for name in [name for name in sys.modules if name.partition(".")[0] == "detrojan"]:
    del sys.modules[name]
sys.path[:0] = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
sys.argv = ["snakemake", *request["arguments"]]

from snakemake.cli import main  # noqa: E402

main(sys.argv[1:])
