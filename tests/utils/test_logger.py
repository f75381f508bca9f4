import io
import logging
import sys

import pytest

from detlib.utils import logger as logger_module
from detlib.utils.logger import (
    create_small_table,
    log_every_n,
    log_every_n_seconds,
    log_first_n,
    setup_logger,
)


@pytest.fixture
def name(request):
    name = f"logtest_{request.node.name}"
    yield name
    logging.getLogger(name).handlers.clear()


def test_repeated_setup_does_not_duplicate_messages(tmp_path, name, capsys):
    for _ in range(2):
        setup_logger(str(tmp_path), name=name)
    logging.getLogger(f"{name}.part").warning("careful")
    text = (tmp_path / "log.txt").read_text()
    assert text.count("careful") == 1 and f"{name}.part WARNING: careful" in text and "\033" not in text
    assert capsys.readouterr().out.count("careful") == 1
    assert not logging.getLogger(name).propagate


def test_other_ranks_write_to_files_only(tmp_path, name, capsys):
    setup_logger(str(tmp_path / "sub" / "run.log"), distributed_rank=2, name=name, enable_propagation=True)
    logging.getLogger(name).info("hello")
    assert "hello" in (tmp_path / "sub" / "run.log.rank2").read_text()
    assert capsys.readouterr().out == ""
    assert logging.getLogger(name).propagate


def test_abbreviation_does_not_change_the_record(name, capsys):
    logger = setup_logger(name=name, abbrev_name="L")
    other = logging.StreamHandler(io.StringIO())
    other.setFormatter(logging.Formatter("%(name)s"))
    logger.addHandler(other)
    logging.getLogger(f"{name}.engine").info("x")
    assert "] L.engine INFO: x" in capsys.readouterr().out
    assert other.stream.getvalue().strip() == f"{name}.engine"


def test_color_on_a_terminal_only(name, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    setup_logger(name=name)
    logging.getLogger(name).error("bad")
    assert "\033[32m[" in terminal.getvalue() and "ERROR\033[0m" in terminal.getvalue()


def messages_of(name):
    stream = io.StringIO()
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(logging.StreamHandler(stream))
    return stream


def test_log_first_n(name):
    stream = messages_of(name)
    for i in range(5):
        log_first_n(logging.INFO, f"caller {i}", n=2, name=name)
    for i in range(4):
        log_first_n(logging.INFO, f"message {i % 2}", name=name, key="message")
    for _ in range(2):
        log_first_n(logging.INFO, "both", name=name, key=("caller", "message"))
    assert stream.getvalue().split("\n")[:-1] == ["caller 0", "caller 1", "message 0", "message 1", "both"]
    with pytest.raises(ValueError, match="'callr'"):
        log_first_n(logging.INFO, "x", key="callr")


def test_default_logger_is_the_module_of_the_caller(caplog):
    with caplog.at_level(logging.INFO, logger=__name__):
        log_first_n(logging.INFO, "who am I")
    assert [record.name for record in caplog.records] == [__name__]


def test_log_every_n(name):
    stream = messages_of(name)
    for i in range(7):
        log_every_n(logging.INFO, str(i), n=3, name=name)
    for i in range(2):
        log_every_n(logging.INFO, f"each {i}", name=name)
    assert stream.getvalue().split() == ["0", "3", "6", "each", "0", "each", "1"]


def test_log_every_n_seconds(name, monkeypatch):
    stream = messages_of(name)
    for now in (100.0, 104.0, 105.5, 111.0):
        monkeypatch.setattr(logger_module.time, "monotonic", lambda now=now: now)
        log_every_n_seconds(logging.INFO, str(now), n=5, name=name)
    assert stream.getvalue().split() == ["100.0", "105.5", "111.0"]


def test_small_table():
    header, rule, row = create_small_table({"AP": 52.83349, "AP50": 87.8}).split("\n")
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["AP", "AP50"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["52.833", "87.800"]
