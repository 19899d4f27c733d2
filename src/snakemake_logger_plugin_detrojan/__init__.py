"""Shows how far a study is: ``snakemake --logger detrojan``.

On a terminal one region that is redrawn, elsewhere a plain line now and then; a failed job with the
end of its log; errors and warnings without Snakemake's tracebacks. Snakemake finds this package by
its name. Snakemake's own log file stays as it is, with all that is left out here.
"""

import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from snakemake.settings.enums import Quietness
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from detrojan.workflow import strict_studies
from snakemake_logger_plugin_detrojan.progress import Progress, num_cells

LINE_EVERY = 10.0  # seconds between two plain lines
STILL_ALIVE_EVERY = 60.0  # seconds after which a plain line comes even if nothing has changed
LOG_LINES = 15
ERROR = " ERROR "  # a line of the level, as detrojan.workflow.job writes it
WIDTH_WITHOUT_TERMINAL = 100
START_S = 5.0  # before a job's script begins: Python, the Snakefile, torch; the table of costs leaves it out
LOG_BYTES = 65536

# Plain messages come without a kind, so they are told apart by how they begin. Before the run all
# are shown but a few; while it runs there may be one a job, so only those that ask for attention.
NOISE = ("Assuming unrestricted shared filesystem", "Using shell:")
INTERRUPTED = "Terminating processes on user request"
WHILE_RUNNING = ("Complete log", INTERRUPTED, "Will exit after", "Trying to restart job")
# What the failed job's own message and our last line have said already.
REPEATED = ("Exiting because a job execution failed", "WorkflowError:\nAt least one job did not complete")
TRACEBACK_LINE = re.compile(r'^\s+File ".*", line \d+, in ')

strict_studies.apply()  # Snakemake imports this package at each start, before it reads a study file


class LogHandler(LogHandlerBase):
    """Turns Snakemake's log records into progress and clear messages."""

    def __post_init__(self) -> None:
        """Open the console. Snakemake calls this at the end of its constructor."""
        file_descriptor = 1 if self.common_settings.stdout else 2
        # A descriptor of its own: on a terminal what jobs write to the usual one is caught.
        stream = os.fdopen(
            os.dup(file_descriptor), "w", encoding=sys.stderr.encoding or "utf-8", errors="replace"
        )
        self.console = Console(
            file=stream,
            highlight=False,
            no_color=self.common_settings.nocolor or None,
            width=None if stream.isatty() else WIDTH_WITHOUT_TERMINAL,
        )
        self.progress = Progress()
        quiet = set(self.common_settings.quiet or ())
        self._silent = bool(quiet & {Quietness.PROGRESS, Quietness.ALL})
        self._planned = False
        self._interrupted = False
        self._display: _Region | _Lines | None = None
        self._asked_costs = False
        self._would_run: dict[str, _WouldRun] = {}
        self._closed = False

    @property
    def writes_to_stream(self) -> bool:
        """Yes, in place of Snakemake's own messages."""
        return True

    @property
    def writes_to_file(self) -> bool:
        """No."""
        return False

    @property
    def has_filter(self) -> bool:
        """Yes: ``--quiet`` is for progress, errors are always shown."""
        return True

    @property
    def has_formatter(self) -> bool:
        """No: what is shown as it is, is shown in Snakemake's format."""
        return False

    @property
    def needs_rulegraph(self) -> bool:
        """No."""
        return False

    def emit(self, record: logging.LogRecord) -> None:
        """Show ``record``, or what it changes."""
        try:
            self._handle(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """End the display and say how the run ended. Snakemake calls this, and Python on exit again."""
        if self._closed:
            return
        self._closed = True
        if self._display is not None:
            self._display.stop()
        if self._planned and self.common_settings.dryrun:
            self.console.print(self._dry_run())
        # With --quiet Snakemake doesn't tell which jobs finish, so there is nothing to sum up.
        elif self._planned and not self._silent:
            self._print(self.progress.end(time.time()))
        super().close()

    def _handle(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            self._plan(record)
        elif event == LogEvent.JOB_INFO:
            self._job_started(record)
        elif event == LogEvent.JOB_FINISHED:
            self.progress.finish(record.job_id, record.created)  # type: ignore[attr-defined]
        elif event == LogEvent.JOB_ERROR:
            self._job_failed(vars(record))
        elif event == LogEvent.GROUP_ERROR:
            for job in record.job_error_info:  # type: ignore[attr-defined]
                self._job_failed(job)
        elif event == LogEvent.ERROR:
            self._error(record)
        elif event is None:
            self._message(record)
        elif self.common_settings.verbose or (event == LogEvent.DEBUG_DAG and self.common_settings.debug_dag):
            self._print(self.format(record))

    def _plan(self, record: logging.LogRecord) -> None:
        stats: dict[str, int] = record.stats  # type: ignore[attr-defined]
        self.progress.plan(stats)
        self._planned = True
        if self._silent or self.common_settings.dryrun or self._display is not None:
            return
        self._display = (
            _Region(self.console, self.progress)
            if self.console.is_terminal
            else _Lines(self.console, self.progress)
        )

    def _job_started(self, record: logging.LogRecord) -> None:
        rule: str = record.rule_name  # type: ignore[attr-defined]
        wildcards: dict[str, str] = record.wildcards  # type: ignore[attr-defined]
        if self.common_settings.dryrun:
            reason: str = record.reason  # type: ignore[attr-defined]
            self._would_run.setdefault(rule, _WouldRun()).add(num_cells(rule, wildcards), reason)
        else:
            self.progress.start(record.jobid, rule, wildcards, record.created)  # type: ignore[attr-defined]
            if self._display is not None and not self._asked_costs:
                self._asked_costs = True
                # Beside the run: it takes seconds of a large study, and jobs can start without it.
                threading.Thread(target=expect, args=(self.progress,), daemon=True).start()
        if self.common_settings.verbose:
            self._print(self.format(record))

    def _job_failed(self, job: dict[str, object]) -> None:
        if self._interrupted:
            return  # it was told to stop
        rule = str(job["rule_name"])
        wildcards = self.progress.fail(int(str(job["jobid"])), rule)
        where = ", ".join(f"{axis}={value}" for axis, value in wildcards.items())
        self._print(f"✗ {rule} failed{': ' if where else ''}{where}", style="bold red")
        logs = job["log"]
        found = [log for log in logs if Path(log).is_file()] if isinstance(logs, list) else []
        # Before a job begins there is no log: what the executor said is all that is known.
        if not found:
            self._print(f"  {job.get('rule_msg') or 'It wrote no log.'}")
        for log in found:
            self._print(f"  The end of {log}:")
            for line in last_lines(Path(log)):
                self._print(f"    {line}", style="red" if ERROR in line else None)

    def _error(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        kind = getattr(record, "exception", "")
        # A script that failed: its job's own record comes too, with what went wrong.
        if text.startswith(REPEATED) or (kind == "RuleException" and "CalledProcessError" in text):
            return
        self._print(clean(text, kind), style="bold red")

    def _message(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self._interrupted |= text.startswith(INTERRUPTED)
        if record.levelno >= logging.WARNING:
            if not text.startswith(REPEATED):
                self._print(text, style="bold red" if record.levelno >= logging.ERROR else "yellow")
        elif self.common_settings.verbose:
            self._print(self.format(record))
        elif self._silent or record.levelno < logging.INFO or hasattr(record, "quietness"):
            return
        elif text.startswith(WHILE_RUNNING) if self._planned else not text.startswith(NOISE):
            self._print(text)

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(Text(text, style or ""), soft_wrap=True)

    def _dry_run(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("would run")
        table.add_column("jobs", justify="right")
        table.add_column("cells", justify="right")
        table.add_column("because")
        for rule, jobs in self.progress.jobs().items():
            would = self._would_run.get(rule, _WouldRun())
            table.add_row(rule, str(jobs), str(would.cells or ""), would.because)
        return Group(table, "A dry run: nothing was done.")


def expect(progress: Progress) -> None:
    """Tell ``progress`` what jobs take by the table of costs, if it is a study of ours that runs."""
    # Snakemake loads all plugins at each start, most of which show nothing.
    from detrojan.commands import plan
    from detrojan.study import files
    from detrojan.workflow import job_costs
    from detrojan.workflow.graph import RESULTS

    try:
        # The first job starts after this study was written.
        study = files.load_study(files.kept(Path(RESULTS)))
        seconds = plan.seconds_a_job(study, job_costs.default())
    except ValueError:
        return  # another workflow's, or a table of costs with a mistake, of which the Snakefile tells
    progress.expect({rule: START_S + script for rule, script in seconds.items()})


class _WouldRun:
    """What a dry run tells of the jobs of a rule."""

    def __init__(self) -> None:
        self.cells = 0
        self.reasons: Counter[str] = Counter()

    def add(self, cells: int, reason: str) -> None:
        self.cells += cells
        # "Missing output files: a, b; Input files updated by another job: c": the first is enough.
        first = reason.partition("; ")[0].partition(":")[0].strip()
        self.reasons[first[:1].lower() + first[1:]] += 1

    @property
    def because(self) -> str:
        return ", ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common(3))


def clean(text: str, kind: str) -> str:
    """Return the message of an exception of Snakemake without the places that it passed through.

    Args:
        text: as Snakemake formats it: kind and place, what is wrong, traceback.
        kind: the exception's class.
    """
    if text.startswith("Traceback"):
        return text  # a bug in Snakemake or a plugin: all of it
    lines = [line for line in text.rstrip().splitlines() if not TRACEBACK_LINE.match(line)]
    # Of a mistake in the study file, where the Snakefile reads it says nothing.
    return "\n".join(lines[1:] if kind == "StudyError" and len(lines) > 1 else lines)


def last_lines(log: Path) -> list[str]:
    """Return the end of a log: from its last error on, if there is one, but no more than 15 lines."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return [f"(no log: {error.strerror})"]
    errors = [place for place, line in enumerate(lines) if ERROR in line]
    if errors:
        first, *after = lines[errors[-1] :]
        return [first, *after[-LOG_LINES + 1 :]]
    return lines[-LOG_LINES:] or ["(empty)"]


class _Region:
    """Stages, cells and time left in one region of the terminal, redrawn in place."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._progress = progress
        self._output = JobOutput(lambda line: console.print(Text.from_ansi(line), soft_wrap=True))
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def stop(self) -> None:
        self._output.stop()
        self._live.stop()

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2, 0, 0))
        for stage in self._progress.stages():
            style = "dim" if stage.done == stage.total else "bold" if stage.running else ""
            running = f"{stage.running} running" if stage.running else ""
            bar = ProgressBar(total=stage.total, completed=stage.done, width=24)
            table.add_row(Text(stage.name, style), bar, Text(f"{stage.done}/{stage.total}", style), running)
        left = self._progress.left(time.time())
        return Group(table, Text(f"{self._progress.cells()}, {left}", "bold"))


class _Lines:
    """A plain line now and then, for logs: when something has changed, else once a minute."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        shown, at = None, time.time()
        while not self._stopped.wait(LINE_EVERY):
            now, stages = time.time(), self._progress.stages()
            if stages != shown or now - at >= STILL_ALIVE_EVERY:
                self._console.print(Text(self._progress.line(now)), soft_wrap=True)
                shown, at = stages, now


class JobOutput:
    """Hands on, line by line, what jobs write to standard error: straight to the terminal, it would
    tear the region apart.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._terminal = os.dup(2)
        read, write = os.pipe()
        os.dup2(write, 2)
        os.close(write)
        self._thread = threading.Thread(target=self._run, args=(read, show), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let standard error be what it was."""
        os.dup2(self._terminal, 2)
        os.close(self._terminal)
        # Ends at once but for a job that is still alive and keeps its end of the pipe.
        self._thread.join(timeout=1)

    @staticmethod
    def _run(read: int, show: Callable[[str], None]) -> None:
        with os.fdopen(read, errors="replace") as lines:
            for line in lines:
                show(line.rstrip("\n"))
