"""The registry of formats, and what the documentation says about them."""

import json
import re
from pathlib import Path

import pytest

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data import catalog as catalog_module
from detlib.data.check import FINDING_KINDS, check_dataset
from detlib.data.convert import convert_dataset
from detlib.data.formats import FORMATS, Candidate, Format, ParsedURI, RawSet, register_format
from detlib.data.formats.base import option_table, uri_table
from detlib.structures import BoxMode
from tests.data.small_datasets import make_image, write, write_coco

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "data.md").read_text()


@pytest.mark.parametrize("table", [uri_table, option_table])
def test_tables_in_the_docs_equal_those_of_the_registry(table):
    assert table() in PAGE, f"docs/data.md must have this table:\n{table()}"


def test_every_kind_of_finding_is_tested():
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "data").rglob("test_*.py"))
    assert [kind for kind in FINDING_KINDS if f'"{kind}"' not in tests] == []


def test_every_kind_of_finding_has_a_row_in_the_docs():
    rows = re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE)
    assert [kind for kind in FINDING_KINDS if kind not in rows] == []


def test_formats_are_named_in_their_own_file_only():
    """The checker, the converter, `dir:` and the catalogs must not know a format by name."""
    data = ROOT / "detlib" / "data"
    shared = [
        *(data / "check").glob("*.py"),
        *(data / "formats" / name for name in ("__init__.py", "base.py", "findings.py", "folder.py")),
        data / "catalog.py",
        data / "convert.py",
    ]
    # COCO's structure is what the checker repairs into, so its name may occur there.
    names = [name for name in FORMATS if name not in ("coco", "dir", "shapes")]
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in shared
        for name in names
        if re.search(rf"[\"']{name}[\"':]", path.read_text())
    ]
    assert not found


class LinesURI(ParsedURI):
    """A format with one line per box, for the tests below."""

    form = "lines:FILE"

    def check(self):
        if not Path(self.body).is_file():
            raise self.error("the file does not exist.")

    def load(self):
        rows = [line.split() for line in Path(self.body).read_text().splitlines()]
        folder = Path(self.body).parent
        return [
            {
                "file_name": str(folder / name),
                "image_id": name,
                "width": 40,
                "height": 30,
                "annotations": [
                    {"category_id": 0, "bbox": [*map(float, box)], "bbox_mode": BoxMode.XYXY_ABS}
                ],
            }
            for name, *box in rows
        ]

    def metadata(self):
        return {"thing_classes": ["bird"], "evaluator_type": "coco"}

    def read_raw(self):
        raw = RawSet(self.body, str(Path(self.body).parent), {"images": [], "categories": []})
        raw.report("lines-broken", "always")
        return raw


def write_lines(source, out, masks):
    lines = [
        " ".join([source.file_name(i), *(str(v) for v in source.box(record["annotations"][0]))])
        for i, record in enumerate(source.dicts)
    ]
    write(f"{out}/boxes.lines", "\n".join(lines))
    return f"lines:{out}/boxes.lines", [f"{out}/{source.file_name(i)}" for i in range(len(source.dicts))]


@pytest.fixture
def lines_format():
    new = Format(
        name="lines",
        summary="one box a line",
        uri_class=LinesURI,
        write=write_lines,
        find=lambda path: [
            Candidate(f"lines:{file}", file.stem, f"found {file.name}") for file in Path(path).glob("*.lines")
        ],
        layout="*.lines",
        findings={"lines-broken": ("error", "a line is broken")},
    )
    before = MetadataCatalog.list()
    yield register_format(new)
    del FORMATS["lines"], FINDING_KINDS["lines-broken"], catalog_module._URI_SCHEMES["lines"]
    for name in MetadataCatalog.list():
        if name not in before:
            MetadataCatalog.remove(name)


def test_a_registered_format_is_known_to_catalog_checker_converter_and_detection(lines_format, tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "bird"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    start = write_coco(tmp_path / "start", content, ("a.jpg",))
    uri = convert_dataset(start, "lines", f"{tmp_path}/out")
    assert uri == f"lines:{tmp_path}/out/boxes.lines"
    for name in (uri, f"dir:{tmp_path}/out"):
        assert DatasetCatalog.get(name)[0]["annotations"][0]["bbox"] == [1, 2, 4, 6]
        assert [f.kind for f in check_dataset(name).findings][0] == "lines-broken"
    assert "| `lines:FILE` | one box a line | yes | yes |" in uri_table()
    with pytest.raises(KeyError, match="lines:..."):
        DatasetCatalog.get("ftp:x")
    with pytest.raises(ValueError, match="'lines' is already registered"):
        register_format(lines_format)


def test_a_format_cannot_take_a_finding_of_another(lines_format):
    with pytest.raises(ValueError, match="'bad-box'"):
        register_format(Format("other", "", LinesURI, findings={"bad-box": ("error", "")}))
    assert "other" not in FORMATS


def test_a_file_claimed_by_one_format_is_not_read_by_another(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "bird"}],
    }
    write(tmp_path / "train/_annotations.coco.json", json.dumps(content))
    write(tmp_path / "train/a.jpg", make_image())
    finders = {f.name: f.find(str(tmp_path)) for f in FORMATS.values() if f.find is not None}
    assert [candidate.scheme for found in finders.values() for candidate in found] == ["roboflow"]
