"""Paths, links, names of detlib and config keys in the documentation exist.

It also lists every private name of PyTorch that the code uses.
"""

import ast
import pkgutil
import re
from pathlib import Path

import pytest

from detlib.config import get_cfg
from tests.source_tree import FILES, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "csrc" / "README.md", *ROOT.glob("docs/*.md")]
pytestmark = pytest.mark.skipif(not PAGES[0].exists(), reason="installed without its checkout")

FOLDERS = r"(?:detlib|docs|tests|tools|configs|csrc|benchmarks|build_backend|\.ci)"
CODE = re.compile(r"```.*?\n(.*?)```|`([^`\n]+)`", re.DOTALL)
PATH = re.compile(rf"(?<![\w/.:{{-]){FOLDERS}/[\w./+-]*(?![\w*{{:=])")
SOURCE = re.compile(r"(?<![\w/.:{@$-])[\w.-]+(?:/[\w.-]+)+\.(?:py|md|cpp|cu|cuh|h|inc|yaml)\b")
# Folders that paths of source files may be relative to.
BASES = [ROOT / folder for folder in (".", "detlib", "detlib/data", "configs", "csrc")]
NAME = re.compile(r"(?<![\w/.:{-])detlib(?:\.\w+)+(?![\w/*])")
KEY = re.compile(r"\b[A-Z][A-Z0-9_]+(?:\.[A-Z][A-Z0-9_]*)+\b(?!\.)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Placeholders and data in instructions, an intended misspelling, and build outputs.
NOT_THERE = re.compile(r"NAME|my_|MY_|BASELR|\.so$|^output/|^birds/")


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


def is_config_key(key):
    """Return whether a config key exists. Dotted words that do not start with a section are not keys."""
    section, *parts = key.split(".")
    node = get_cfg()
    if section not in node or not isinstance(node[section], dict):
        return True
    for part in (section, *parts):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def private_names(tree):
    """Yield the private names of PyTorch and the standard library that a module uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            if ast.unparse(node.value).partition(".")[0] in ("torch", "nn", "sys", "os", "multiprocessing"):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            holder, name = node.args[0], node.args[1]
            if isinstance(name, ast.Constant) and re.match(r"_[^_]", name.value):
                if ast.unparse(holder).partition(".")[0] in ("torch", "nn", "forward_ad"):
                    yield name.value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_names_and_links_exist(page):
    text = page.read_text()
    missing = [path for path in found_in(PATH, text) if not (ROOT / path).exists()]
    missing += [path for path in found_in(SOURCE, text) if not any((base / path).exists() for base in BASES)]
    missing += [name for name in found_in(NAME, text) if not is_importable(name)]
    missing += [key for key in found_in(KEY, text) if not is_config_key(key)]
    for path, section in links_in(text):
        target = page.parent / path if path else page
        if not target.exists():
            missing.append(path)
        elif section and section not in sections_of(target.read_text()):
            missing.append(f"{path}#{section}")
    assert not missing


def test_private_names_are_listed_among_the_sharp_edges():
    page = (ROOT / "docs" / "sharp_edges.md").read_text()
    used = {name for path in FILES for name in private_names(parse(path)) if name not in ("_C", "_utils")}
    assert "_AutoDispatchBelowAutograd" in used and "_foreach_norm" in used
    assert sorted(name for name in used if name not in page) == []


def test_names_among_the_sharp_edges_are_in_the_code():
    page = (ROOT / "docs" / "sharp_edges.md").read_text()
    code = "\n".join(path.read_text() for path in FILES)
    names = re.findall(r"`([A-Za-z_]\w*_\w+|[A-Z][a-z]+[A-Z]\w+)`", page)
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_paths_names_and_links_are_found():
    text = (
        "[a](docs/a.md#some-part) `detlib/ops/nms.py` `s3://detlib/x` `detlib/my_op.py`\n"
        "```\npython tools/a.py x/y\n```"
    )
    assert found_in(PATH, text) == ["detlib/ops/nms.py", "tools/a.py"]
    assert found_in(SOURCE, "`ops/nms.py`, `-/x`, `s3://b/a.yaml`") == ["ops/nms.py"]
    assert found_in(NAME, "`detlib.ops.nms` and `-m detlib.report X`, x.detlib.y") == [
        "detlib.ops.nms",
        "detlib.report",
    ]
    assert links_in(text) == [("docs/a.md", "some-part")]
    assert sections_of("# A, `b` and C\n## D") == {"a-b-and-c", "d"}
    assert is_importable("detlib.ops.nms") and not is_importable("detlib.ops.nmss")
    assert found_in(KEY, "`SOLVER.AMP.ENABLED True` `README.md`") == ["SOLVER.AMP.ENABLED"]
    assert is_config_key("SOLVER.AMP.ENABLED") and not is_config_key("SOLVER.AMPS")
