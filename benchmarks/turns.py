"""Benchmark processes that prepare side by side and measure one after the other.

Compiling takes minutes of CPU, measuring seconds of a GPU that must then serve nobody else. A child calls `wait()` between
the two; its parent lets the children of a batch go on one by one, once all of them wait. A child that measures in parts calls
it before each: then the parts of all children alternate, and what slows a machine down for a while slows all of them down.

The children share the CPUs: by itself, Inductor would start as many compilers in each of them as the machine has CPUs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO

READY = "ready to measure"


def arguments(p: argparse.ArgumentParser) -> None:
    """What the command line of a parent has for it."""
    p.add_argument("--jobs", type=int, default=1, help="processes that compile at once (default: %(default)s)")
    p.add_argument("--limit", type=float, default=400.0, help="seconds to compile, and to measure (default: %(default)s)")


class Failed(Exception):
    """A child that gave no result; the message is its last error, or how long it took."""


def wait() -> None:
    """In a child: everything is compiled and warm; returns when it may measure."""
    print(READY, flush=True)
    sys.stdin.readline()


class _Child:
    def __init__(self, command: Sequence[str], limit: float, threads: int, told: Callable[[float], object]) -> None:
        self.told, self.began = told, time.perf_counter()
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe that nobody reads would fill up)
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)} | os.environ
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.limit, self.late = limit, False
        self.waits, self.last = True, ""

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.late = True
            self.process.kill()

    def _follow(self) -> None:
        """Returns when the child waits, or has ended, or took too long."""
        assert self.process.stdout is not None
        timer = threading.Timer(self.limit, self._stop)
        timer.start()
        self.waits = False
        for line in self.process.stdout:
            if line.strip() == READY:
                self.waits = True
                break
            self.last = line.strip() or self.last
        timer.cancel()

    def ready(self) -> None:
        """Until it has compiled."""
        self._follow()
        self.told(time.perf_counter() - self.began)

    def turn(self) -> None:
        """Lets it measure, until it waits again or ends."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it ended while it waited
            self.waits = False
        else:
            self._follow()

    def result(self) -> str:
        """Of one that has ended: the last line that it printed. Raises Failed."""
        self.process.communicate()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        self.errors.close()
        if self.late:
            raise Failed(f"took more than {self.limit:.0f} s")
        if self.process.returncode:
            named = [line for line in lines if re.match(r"[\w.]*Error\b", line)]  # CUDA's go on with advice
            raise Failed((named or lines or ["no message"])[-1][-300:])
        return self.last


def run(
    commands: Sequence[Sequence[str]], jobs: int, limit: float,
    ready: Callable[[int, float], object] = lambda which, seconds: None,
) -> Iterator[str | Failed]:
    """The last line that each command printed, in their order; `jobs` of them prepare at once, within `limit` seconds each, and
    each turn of measuring takes as long at most.

    ready: called, from a thread, with which command is prepared, or gave up, and after how many seconds.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for start in range(0, len(commands), jobs):
        batch = enumerate(commands[start : start + jobs], start)
        children = [_Child(command, limit, threads, partial(ready, which)) for which, command in batch]
        with ThreadPoolExecutor(len(children)) as pool:
            list(pool.map(_Child.ready, children))
        done = 0
        while done < len(children):
            for child in children:
                if child.waits:
                    child.turn()
                while done < len(children) and not children[done].waits:
                    try:
                        yield children[done].result()
                    except Failed as failed:
                        yield failed
                    done += 1
