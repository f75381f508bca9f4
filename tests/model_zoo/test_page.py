"""Tests that the page on the model zoo lists the shipped configs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \|(?: (.+) \|)?$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "model_zoo.md").read_text())


def test_page_has_one_row_for_each_config():
    paths = [path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.*")]
    shipped = {
        path.as_posix()
        for path in paths
        if path.suffix in (".yaml", ".py")
        and not path.name.startswith("Base-")
        and not {"Quickstart", "common", "models", "__pycache__"} & set(path.parts)
    }
    listed = [name for name, _, _ in ROWS]
    assert len(listed) == len(set(listed))
    assert set(listed) == shipped


def test_figures_are_percentages_or_dashes():
    for name, description, figures in ROWS:
        assert description.strip(), name
        for figure in figures.split(" | ") if figures else ():
            assert figure == "–" or 20 < float(figure) < 90, (name, figure)
