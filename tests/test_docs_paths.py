"""Paths, links and names of detlib in the documentation exist."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "csrc" / "README.md", *ROOT.glob("docs/*.md")]
pytestmark = pytest.mark.skipif(not PAGES[0].exists(), reason="installed without its checkout")

FOLDERS = r"(?:detlib|docs|tests|tools|configs|csrc|benchmarks|build_backend|\.ci)"
CODE = re.compile(r"```.*?\n(.*?)```|`([^`\n]+)`", re.DOTALL)
PATH = re.compile(rf"(?<![\w/.:{{-]){FOLDERS}/[\w./+-]*(?![\w*{{:=])")
NAME = re.compile(r"(?<![\w/.:{-])detlib(?:\.\w+)+(?![\w/*])")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Placeholders in instructions, and what the build makes.
NOT_THERE = re.compile(r"NAME|my_|\.so$")


def code_of(text):
    return "\n".join(block or span for block, span in CODE.findall(text))


def found_in(pattern, text):
    """Return the paths or names in code, sorted."""
    return sorted(
        {match.rstrip(".") for match in pattern.findall(code_of(text)) if not NOT_THERE.search(match)}
    )


def links_in(text):
    """Return the links to files and to sections of pages, as (path, section)."""
    links = (link.partition("#") for link in LINK.findall(text) if "://" not in link)
    return [(path, section) for path, _, section in links]


def sections_of(text):
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def is_importable(name):
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_names_and_links_exist(page):
    text = page.read_text()
    missing = [path for path in found_in(PATH, text) if not (ROOT / path).exists()]
    missing += [name for name in found_in(NAME, text) if not is_importable(name)]
    for path, section in links_in(text):
        target = page.parent / path if path else page
        if not target.exists():
            missing.append(path)
        elif section and section not in sections_of(target.read_text()):
            missing.append(f"{path}#{section}")
    assert not missing


def test_paths_names_and_links_are_found():
    text = (
        "[a](docs/a.md#some-part) `detlib/ops/nms.py` `s3://detlib/x` `detlib/my_op.py`\n"
        "```\npython tools/a.py x/y\n```"
    )
    assert found_in(PATH, text) == ["detlib/ops/nms.py", "tools/a.py"]
    assert found_in(NAME, "`detlib.ops.nms` and `-m detlib.report X`, x.detlib.y") == [
        "detlib.ops.nms",
        "detlib.report",
    ]
    assert links_in(text) == [("docs/a.md", "some-part")]
    assert sections_of("# A, `b` and C\n## D") == {"a-b-and-c", "d"}
    assert is_importable("detlib.ops.nms") and not is_importable("detlib.ops.nmss")
