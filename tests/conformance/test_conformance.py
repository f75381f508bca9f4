"""Models built from the shipped configs give detectron2's numbers: every case in `cases/`."""

import pathlib

import pytest

from tests.conformance.harness import Case, run_case

HERE = pathlib.Path(__file__).resolve().parent
CASES = sorted((HERE / "cases").glob("*.json"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path):
    differences = run_case(Case.load(path), HERE.parents[1] / "configs")
    assert not differences, f"{len(differences)} differences:\n" + "\n".join(differences[:20])


def test_there_are_cases():
    assert len(CASES) >= 3
