"""Damaged output folders: the report is written whatever is in them."""

import os
import pathlib

from detlib.data import MetadataCatalog
from detlib.report.records import read_records
from detlib.report.writer import make_report
from tests.fuzz import mutations
from tests.fuzz.engine import Target, fuzz_tests
from tests.report.run_folder import ground_truth_and_results, make_run


def _write(folder):
    make_run(pathlib.Path(folder), *ground_truth_and_results(num_images=3), with_images=False)


def _report(folder):
    known = {*MetadataCatalog.list()}
    try:
        path = make_report(folder)
    finally:
        for name in MetadataCatalog.list():
            if name not in known:
                MetadataCatalog.remove(name)
    with open(path, encoding="utf-8") as file:
        assert "</html>" in file.read()


def _read_metrics(folder):
    records = read_records(os.path.join(folder, "metrics.json"))
    for name in records.names:
        records.series(name)
    records.last_values()
    records.per_class()
    records.training_seconds()


def _mutate_lines(data, rng):
    """Damage one line of JSON."""
    lines = data.splitlines(keepends=True)
    index = rng.randrange(len(lines))
    lines[index] = mutations.mutate_json(lines[index], rng)
    return b"".join(lines)


TARGETS = [
    Target("metrics", _write, ("metrics.json",), _mutate_lines, _read_metrics, count=200),
    Target("report-metrics", _write, ("metrics.json",), _mutate_lines, _report, count=2),
    Target("report-config", _write, ("config.yaml",), mutations.mutate_yaml, _report, count=2),
    Target(
        "report-results",
        _write,
        ("inference/coco_instances_results.json", "ground_truth.json"),
        mutations.mutate_json,
        _report,
        count=2,
    ),
]

test_damaged_files_are_refused_or_read, test_damaged_files_for_five_minutes = fuzz_tests(TARGETS)
