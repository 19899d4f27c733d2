"""A script in a fork of the server is a script in a process of its own: exit code, signals, state, files."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from detrojan.workflow.fork_server import ForkServer

WAIT_S = 20


@pytest.fixture
def server():
    started = ForkServer(["email.message"])  # something that a script can find loaded
    yield started
    started.close()


@pytest.fixture
def script(tmp_path):
    """Return a function that writes a script and returns its path."""

    def write(text, name="a script.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def waited(condition):
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("pass", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit(3)", 3),
        ("raise SystemExit('a reason')", 1),
        ("raise ValueError('broken')", 1),
        ("def broken(:", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
        ("import os; os._exit(7)", 7),
    ],
)
def test_the_exit_code_is_pythons(server, script, text, code):
    assert server.run(script(text), dict(os.environ)) == code


def test_what_a_script_says_when_it_fails(script, tmp_path):
    failing = script("import sys; print('out', flush=True); raise ValueError('broken')")
    program = f"""
        from detrojan.workflow.fork_server import ForkServer
        server = ForkServer([])
        server.run({failing!r}, {{}})
        server.close()
    """
    done = subprocess.run(
        [sys.executable, script(program, "driver.py")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "out\n"
    assert "Traceback" in done.stderr
    assert "a script.py" in done.stderr
    assert done.stderr.endswith("ValueError: broken\n")


def test_a_script_has_its_folder_its_variables_and_what_was_imported(server, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = script(
        """
        import os, pathlib, sys
        assert __name__ == "__main__"
        assert dict(os.environ) == {"ONLY": "this"}, os.environ
        assert "email.message" in sys.modules
        pathlib.Path("here").touch()
        """
    )
    assert server.run(path, {"ONLY": "this"}) == 0
    assert (tmp_path / "here").exists()


def test_no_script_meets_what_another_left(server, script):
    first = script("import email.message as m, os; m.left = 1; os.environ['LEFT'] = '1'; os.chdir('/')")
    look = "import email.message as m, os; assert not hasattr(m, 'left'); assert 'LEFT' not in os.environ"
    second = script(look, "second.py")
    assert server.run(first, {}) == 0
    assert server.run(second, {}) == 0


def test_a_script_holds_no_file_but_the_three_of_every_program(server, script, tmp_path):
    """Not those of the server, and none of another job."""
    begun, names = tmp_path / "begun", tmp_path / "names"
    slow = script(f"import time, pathlib; pathlib.Path({str(begun)!r}).touch(); time.sleep(1)", "slow.py")
    look = script(
        f"""
        import os, pathlib
        paths = [f"/proc/self/fd/{{number}}" for number in os.listdir("/proc/self/fd")]
        found = [os.readlink(path) for path in paths if os.path.islink(path)]  # the listing's own is closed
        pathlib.Path({str(names)!r}).write_text("\\n".join(found))
        """
    )
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(server.run, slow, {})
        assert waited(begun.exists)
        assert server.run(look, {}) == 0
        assert beside.result() == 0
    inherited = {str(Path(f"/proc/self/fd/{number}").readlink()) for number in range(3)}
    assert set(names.read_text().splitlines()) <= inherited


def test_scripts_run_beside_each_other_and_each_gets_its_own_code(server, script, tmp_path):
    codes = [3, 0, 5, 1, 0, 9]
    paths = [
        script(f"import time; time.sleep(0.2); raise SystemExit({code})", f"{at}.py")
        for at, code in enumerate(codes)
    ]
    started = time.monotonic()
    with ThreadPoolExecutor(len(codes)) as pool:
        assert list(pool.map(lambda path: server.run(path, {}), paths)) == codes
    assert time.monotonic() - started < 0.2 * len(codes)


STOPPED = """
    import pathlib, signal, sys, time
    def stop(number, frame):
        pathlib.Path({stopped!r}).touch()
        sys.exit(1)
    signal.signal(signal.SIGTERM, stop)
    pathlib.Path({started!r}).touch()
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_driver_is_killed_its_jobs_are_told_to_stop(script, tmp_path, how):
    started, stopped = tmp_path / "started", tmp_path / "stopped"
    slow = script(STOPPED.format(started=str(started), stopped=str(stopped)))
    driver = script(
        f"from detrojan.workflow.fork_server import ForkServer; ForkServer([]).run({slow!r}, {{}})",
        "driver.py",
    )
    process = subprocess.Popen([sys.executable, driver])
    assert waited(started.exists)
    process.send_signal(how)
    process.wait()
    assert waited(stopped.exists)


def test_a_server_that_died_is_said_to_have(server, script):
    server._process.kill()
    server._process.wait()
    assert not server.alive
    with pytest.raises((RuntimeError, BrokenPipeError)):
        server.run(script("pass"), {})


def test_a_keyboards_interrupt_reaches_the_job_and_not_the_server(server, script):
    path = script(
        """
        import os, signal, time
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise SystemExit(4)
        """
    )
    assert server.run(script("pass", "first.py"), {}) == 0  # it has begun to serve
    server._process.send_signal(signal.SIGINT)
    assert server.run(path, {}) == 4


def test_what_scripts_took_counts_as_the_drivers(script):
    """Or comparing the processor time of two runs would flatter forks."""
    program = script(
        """
        import resource, sys
        from detrojan.workflow.fork_server import ForkServer
        server = ForkServer([])
        server.run(sys.argv[1], {})
        server.close()
        taken = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(taken.ru_utime + taken.ru_stime)
        """,
        "driver.py",
    )
    busy = script("import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass")
    done = subprocess.run([sys.executable, program, busy], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.9
