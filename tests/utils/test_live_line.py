"""The live line on a terminal, and other output next to it."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from detlib.utils import live_line
from detlib.utils.events import CommonMetricPrinter, EventStorage
from detlib.utils.live_line import LiveLine
from detlib.utils.logger import setup_logger

ROOT = Path(__file__).parents[2]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text: str) -> list[str]:
    """Return the lines that a terminal shows after `text`, with carriage returns and ESC[K interpreted."""
    lines, column = [""], 0
    i = 0
    while i < len(text):
        if text.startswith("\033[K", i):
            lines[-1] = lines[-1][:column]
            i += 3
            continue
        if text[i] == "\n":
            lines.append("")
            column = 0
        elif text[i] == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column] + text[i] + lines[-1][column + 1 :]
            column += 1
        i += 1
    return lines


@pytest.fixture
def become_terminal(monkeypatch):
    """Return a function that replaces stdout; pytest would undo a replacement made in a fixture."""

    def become() -> _Terminal:
        monkeypatch.setattr(sys, "stdout", _Terminal())
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "60")
        return sys.stdout

    yield become
    live_line._shown.clear()


def test_log_lines_are_above_the_live_line(become_terminal, tmp_path):
    terminal = become_terminal()
    logger = setup_logger(str(tmp_path), name="live_line_test", color=False)
    line = LiveLine()
    line.show("working 1")
    logger.info("a log line, longer than the line")
    line.show("w 2")
    logger.info("plain progress", extra={"is_progress": True})
    shown = screen(terminal.getvalue())
    assert shown[0].endswith("a log line, longer than the line") and shown[1:] == ["w 2"]
    line.close()
    assert screen(terminal.getvalue())[1:] == [""] and not live_line.is_shown()
    logger.info("progress without a line", extra={"is_progress": True})
    assert screen(terminal.getvalue())[1].endswith("progress without a line")
    # The file has all log lines, and nothing of the live line.
    text = (tmp_path / "log.txt").read_text()
    assert text.count("\n") == 3 and "working" not in text and "\r" not in text and "plain progress" in text


def test_line_is_truncated_and_prints_overwrite_it(become_terminal):
    terminal = become_terminal()
    line = LiveLine()
    line.show("x" * 200)
    assert screen(terminal.getvalue()) == ["x" * 59]
    print("short")
    assert screen(terminal.getvalue())[0].startswith("short")


@pytest.fixture
def storage():
    with EventStorage() as storage:
        yield storage


def _step(storage, iteration):
    storage.iter = iteration
    storage.put_scalars(total_loss=1.25, loss_cls=0.5, time=0.5, data_time=0.125)
    storage.put_scalar("lr", 0.02, smoothing_hint=False)


def test_printer_draws_the_line_on_a_terminal(become_terminal, storage):
    terminal = become_terminal()
    printer = CommonMetricPrinter(max_iter=100)
    for i in range(3):
        _step(storage, i)
        printer.step()
    # The first step draws; the others follow too soon.
    assert (
        screen(terminal.getvalue())[0]
        == "iter: 1/100  eta: 0:00:49  total_loss: 1.25  lr: 0.02  time: 0.500"[:59]
    )
    printer._next_drawing = 0.0
    printer.step()
    assert screen(terminal.getvalue())[0].startswith("iter: 3/100  eta: 0:00:48  ")
    printer.finish()
    assert screen(terminal.getvalue()) == [""]


@pytest.mark.parametrize("reason", ["a file", "a dumb terminal", "live=False"])
def test_printer_draws_no_line_elsewhere(become_terminal, storage, monkeypatch, reason):
    become_terminal()
    if reason == "a file":
        monkeypatch.setattr(sys, "stdout", io.StringIO())
    if reason == "a dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    printer = CommonMetricPrinter(max_iter=100, live=False if reason == "live=False" else None)
    _step(storage, 0)
    printer.step()
    printer.finish()
    assert sys.stdout.getvalue() == ""


def test_closed_terminal_is_ignored(become_terminal, storage):
    terminal = become_terminal()
    printer = CommonMetricPrinter(max_iter=100)
    _step(storage, 0)
    terminal.close()
    LiveLine().show("gone")
    printer.finish()


_TRAINING = textwrap.dedent(
    """
    import logging, time
    from detlib.utils.events import CommonMetricPrinter, EventStorage
    from detlib.utils.logger import setup_logger

    setup_logger()
    printer = CommonMetricPrinter(20)
    with EventStorage() as storage:
        for storage.iter in range(20):
            time.sleep(0.06)
            storage.put_scalars(total_loss=1.5, time=0.06)
            if storage.iter == 9:
                logging.getLogger("detlib").info("in between")
            if (storage.iter + 1) % 10 == 0:
                printer.write()
            printer.step()
        printer.finish()
        logging.getLogger("detlib").info("the end")
    """
)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo terminal")
def test_on_a_real_terminal():
    import pty

    main, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", _TRAINING], stdout=child, stderr=child, env=env, cwd=ROOT
    )
    os.close(child)
    seen = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # on Linux: the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(main)
    assert process.wait() == 0, seen
    text = seen.decode().replace("\r\n", "\n")
    assert text.count("\r\033[Kiter: ") >= 4
    shown = screen(text)
    assert not [line for line in shown if "iter: " in line]
    assert sum("in between" in line for line in shown) == 1 and "the end" in shown[-2]
    piped = subprocess.run([sys.executable, "-c", _TRAINING], capture_output=True, text=True, env=env)
    assert "\r" not in piped.stdout and "\033" not in piped.stdout
    assert [
        line for line in piped.stdout.splitlines() if "iter: 10/20  eta: 0:00:00  total_loss: 1.5" in line
    ]


def test_hidden_erases_and_redraws_the_line(become_terminal):
    terminal = become_terminal()
    line = LiveLine()
    line.show("first")
    with live_line.hidden():
        terminal.write("output\n")
    assert screen(terminal.getvalue()) == ["output", "first"]
