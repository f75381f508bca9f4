"""Runs a function on many damaged files, in a process of its own that may crash or hang.

A case is a function of its number, so a fault is reproduced by `Target.write(folder, number)`.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest

DOCUMENTED = (ValueError, TypeError, KeyError, OSError)
SECONDS_PER_FILE = 30.0  # of a file of a few kilobytes; generous, as the machine may be busy
SECONDS_WHEN_SLOW = 300.0
_MEMORY = 3 << 30  # bytes that a process may take beyond what it starts with
_MAX_SHOWN = 8


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        name: name of the test.
        create: writes a valid dataset, or another input, into a folder.
        files: the files that are damaged, relative to the folder.
        mutate: a function of `tests.fuzz.mutations`.
        run: reads the folder. Raises AssertionError for a fault that it sees itself.
        count: number of cases in the default tests.
    """

    name: str
    create: Callable[[str], object]
    files: tuple[str, ...]
    mutate: Callable[[bytes, random.Random], bytes]
    run: Callable[[str], object]
    count: int = 80

    def write(self, folder, number):
        """Write a case and return the name of the damaged file. The folder holds the valid input."""
        rng = random.Random(f"{self.name} {number}")
        file = rng.choice(self.files)
        path = os.path.join(folder, file)
        with open(path + ".valid", "rb") as opened:
            data = opened.read()
        with open(path, "wb") as opened:
            opened.write(self.mutate(data, rng))
        return file

    def prepare(self, folder):
        """Write the valid input, run it, and keep a copy of each file that is going to be damaged."""
        folder = os.fspath(folder)
        self.create(folder)
        self.run(folder)
        for file in self.files:
            path = os.path.join(folder, file)
            shutil.copyfile(path, path + ".valid")

    def fault(self, folder, number):
        """Run a case; return a description of what is wrong, or None."""
        file = self.write(folder, number)
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.run(folder)
        except DOCUMENTED as error:
            text = f"{error} {' '.join(getattr(error, '__notes__', ()))}"
            if os.path.basename(file) not in text and folder not in text:
                return f"names neither file nor folder: {describe(error)}"
        except BaseException as error:
            return f"undocumented {describe(error)}"
        finally:
            shutil.copyfile(os.path.join(folder, file) + ".valid", os.path.join(folder, file))
        return None


@contextlib.contextmanager
def quiet():
    """Redirect what is printed into streams that, as those of a terminal, take valid UTF-8 only."""
    with (
        contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")),
        contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")),
    ):
        yield


def describe(error):
    """Return type and text of an error, and the place in detlib that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/detlib/" in f.filename]
    where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}: {str(error)[:300]!r}"


def _serve(target, folder, first, end, connection):
    """Run cases in a forked process and send the fault of each, or None."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    number = first
    while end is None or number < end:
        connection.send(target.fault(folder, number))
        number += 1
    connection.close()


def run_cases(target, folder, count, seconds=None):
    """Return the faults of a target by number of the case.

    Args:
        target: what to fuzz.
        folder: an empty folder.
        count: number of cases, ignored if there is a limit in seconds.
        seconds: time to run for.
    """
    folder = os.fspath(folder)
    target.prepare(folder)
    context = multiprocessing.get_context("fork")
    faults, number, start = {}, 0, time.monotonic()
    end = None if seconds else count
    while end is None or number < end:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(target, folder, number, end, sender), daemon=True)
        process.start()
        sender.close()
        while end is None or number < end:
            if seconds and time.monotonic() - start > seconds:
                end = number
                break
            if not receiver.poll(SECONDS_PER_FILE):
                faults[number] = f"takes more than {SECONDS_PER_FILE} s"
                break
            try:
                fault = receiver.recv()
            except EOFError:
                process.join()
                faults[number] = f"the process ended with exit code {process.exitcode}"
                break
            if fault:
                faults[number] = fault
            number += 1
        process.kill()
        process.join()
        for file in target.files:  # the process may have ended before it restored them
            shutil.copyfile(os.path.join(folder, file) + ".valid", os.path.join(folder, file))
        number += number in faults
    return faults


def assert_no_faults(target, folder, seconds=None):
    """Run a target's cases, and fail with the first faults."""
    faults = run_cases(target, folder, target.count, seconds)
    shown = [f"case {number}: {fault}" for number, fault in [*faults.items()][:_MAX_SHOWN]]
    assert not faults, f"{target.name}: {len(faults)} faults:\n" + "\n".join(shown)


def fuzz_tests(targets):
    """Return the default test and the slow test of a file's targets."""
    named = pytest.mark.parametrize("target", targets, ids=lambda target: target.name)

    @named
    def test_damaged_files_are_refused_or_read(target, tmp_path):
        assert_no_faults(target, tmp_path)

    @pytest.mark.slow
    @named
    def test_damaged_files_for_five_minutes(target, tmp_path):
        assert_no_faults(target, tmp_path, SECONDS_WHEN_SLOW)

    return test_damaged_files_are_refused_or_read, test_damaged_files_for_five_minutes
