"""What benchmarks/memory.py promises of itself: it counts children too, and what processes share once."""

import sys

import memory

HELD = 100_000_000  # bytes
# A process that holds memory, and a fork of it, which shares that; then the fork takes as much of its own.
PROGRAM = f"""
import os, time
held = b"x" * {HELD}
child = os.fork()
if not child:
    more = b"y" * {HELD}
time.sleep(2.5)
os._exit(3 if child else 0)
"""


def test_what_is_shared_counts_once(monkeypatch):
    monkeypatch.setattr(memory, "INTERVAL", 0.1)
    code, most = memory.peak([sys.executable, "-S", "-c", PROGRAM])
    assert code == 3
    assert 2 * HELD < most.shared_once < 2.5 * HELD
    assert 3 * HELD < most.resident < 3.5 * HELD
