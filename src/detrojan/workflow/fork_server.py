"""Starts a job's script in a moment, by forking a process that has imported what scripts need.

On one machine, most of a small job is Python that imports torch. The driver of a run starts one server,
which imports all that once; each job is a fork of it: a process of its own, which has loaded no image, no
model and no method, and touched no GPU. What a job may read stands in its rule, as ever.

The server ends with its driver, and asks the jobs that are still at work to stop. Linux alone: elsewhere
system libraries don't survive a fork. A job of several threads gets a process of its own, since libraries
choose their number of threads when they are loaded.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

SWITCH = "DETROJAN_FORK"  # 0: every script starts a Python of its own
# What scripts import, but for aggregate and report, which are one job each. Methods are loaded by jobs.
PRELOADED = (
    "numpy",
    "pandas",
    "pyarrow.parquet",
    "torch",
    "snakemake.script",
    "detrojan.stages.classifier",
    "detrojan.stages.defend",
    "detrojan.stages.evaluate",
    "detrojan.stages.ingest",
    "detrojan.stages.sampling",
    "detrojan.workflow.job",
)
# Read by numerical libraries when they are loaded; Snakemake sets them for each script likewise.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def usable() -> bool:
    """Return whether jobs may be forked here."""
    return sys.platform == "linux" and os.environ.get(SWITCH, "1") != "0"


# --- the driver's side ------------------------------------------------------------------------------


class ForkServer:
    """A server at work, as its driver sees it. Any thread may run scripts.

    Args:
        modules: what the server imports before it forks.
    """

    def __init__(self, modules: Sequence[str] = PRELOADED) -> None:
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()
        # Snakemake may hold the interpreter's path quoted, see snakemake_patches.
        python = shlex.split(sys.executable)[0]
        command = [python, "-m", __name__, str(theirs.fileno()), *modules]
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        environment = os.environ | dict.fromkeys(THREADS, "1") | {"PYTHONPATH": paths}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()

    @property
    def alive(self) -> bool:
        """Whether it can run scripts."""
        return self._process.poll() is None

    def run(self, script: str, environment: dict[str, str]) -> int:
        """Run a Python file in a fork, in this process's working folder; return the exit code.

        Args:
            script: its path.
            environment: all variables that it sees.

        Raises:
            RuntimeError: the server has died; what became of the script is not known.
        """
        connection, theirs = socket.socketpair()
        with connection:
            with self._lock:
                socket.send_fds(self._control, [b"."], [theirs.fileno()])
            theirs.close()
            request = {"script": script, "folder": str(Path.cwd()), "environment": environment}
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = connection.makefile().readline()
        if not answer:
            raise RuntimeError(f"{script}: the process that starts scripts has died; {SWITCH}=0 does without")
        return int(answer)

    def close(self) -> None:
        """End the server, and wait for it: the system then counts what it took as this process's."""
        self._control.close()
        self._process.wait()


@functools.cache
def server() -> ForkServer:
    """Return this process's server; the first call starts it, and the end of this process ends it."""
    started = ForkServer()
    atexit.register(started.close)
    return started


# --- the server's side ------------------------------------------------------------------------------


class _Jobs:
    """The server's loop: it forks, watches and reaps."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._connections: dict[int, socket.socket] = {}  # of the jobs at work, by process
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._begin)
        # A child's end wakes the loop.
        self._ended, self._wake = os.pipe()
        for end in (self._ended, self._wake):
            os.set_blocking(end, False)
        self._selector.register(self._ended, selectors.EVENT_READ, self._reap)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._open = True

    def serve(self) -> None:
        """Go on until the driver has gone and all jobs have ended."""
        while self._open or self._connections:
            for key, _ in self._selector.select():
                key.data()

    def _begin(self) -> None:
        data, descriptors, _, _ = socket.recv_fds(self._control, 1, 1)
        if not data:
            self._selector.unregister(self._control)
            self._open = False
            for process in self._connections:
                self._stop(process)
            return
        connection = socket.socket(fileno=descriptors[0])
        line = connection.makefile().readline()
        if not line:  # the driver went in the middle of asking
            connection.close()
            return
        process = os.fork()
        if not process:
            connection.close()
            self._become(json.loads(line))
        self._connections[process] = connection
        stop = functools.partial(self._left, process)
        self._selector.register(connection, selectors.EVENT_READ, stop)

    def _left(self, process: int) -> None:
        """The driver says nothing more on a job's connection: it is gone."""
        self._selector.unregister(self._connections[process])
        self._stop(process)

    @staticmethod
    def _stop(process: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._ended, 4096)
        for process in list(self._connections):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
                connection = self._connections.pop(process)
                with contextlib.suppress(KeyError):
                    self._selector.unregister(connection)
                with connection, contextlib.suppress(OSError):  # the driver may be gone
                    # As a shell says it.
                    connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())

    def _become(self, request: dict[str, Any]) -> NoReturn:
        """Be the job: run its script, and end with its exit code."""
        code = 1
        try:
            self._leave()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(request["folder"])
            os.environ.clear()
            os.environ.update(request["environment"])
            code = _exit_code(request["script"])
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

    def _leave(self) -> None:
        """Close, in a job, what is the server's alone."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        os.close(self._ended)
        os.close(self._wake)
        self._control.close()
        for connection in self._connections.values():
            connection.close()


def _exit_code(script: str) -> int:
    """Run a file as Python would; return what Python would end with."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)  # noqa: T201
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Serve on the socket whose number comes first, once the modules that follow it are imported."""
    # From a terminal, an interrupt reaches the jobs too, and these end in their own way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there stays shared with the forks
    _Jobs(control).serve()


if __name__ == "__main__":
    main()
