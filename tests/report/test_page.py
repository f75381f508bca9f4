"""The HTML page: well-formed, escaped and self-contained."""

from html.parser import HTMLParser

import pytest

from detlib.report.page import Page

VOID = {"meta", "img", "br", "link", "input"}


class Checker(HTMLParser):
    """An HTML parser that asserts that tags nest and collects texts, tags and references."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.references = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)


def check_page(text):
    """Check a complete page and return its parsed content."""
    checked = Checker(text)
    for reference in checked.references:
        assert reference.startswith(("data:image/", "#part-")), reference[:80]
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    for tag, attributes in checked.tags:
        assert tag not in ("link", "iframe", "object", "base")
        if tag == "img":
            assert attributes["alt"]
        if tag == "script":
            assert not attributes
    ids = [attributes["id"] for _, attributes in checked.tags if "id" in attributes]
    links = [r[1:] for r in checked.references if r.startswith("#")]
    assert len(set(ids)) == len(ids) and set(links) == set(ids)
    return checked


def test_all_texts_are_escaped():
    evil = '<script>alert("1")</script> & \'"><img src=x>'
    page = Page(evil)
    page.section(evil)
    page.heading(evil)
    page.text(evil)
    page.note(evil)
    page.facts({evil: evil})
    page.figure(b"123", evil, evil)
    page.table(([evil, "n"], [[evil, 1.5]]), evil)
    checked = check_page(page.render())
    assert sum(tag == "script" for tag, _ in checked.tags) == 1
    assert sum(tag == "img" for tag, _ in checked.tags) == 1
    assert checked.texts.count(evil) == 12  # title twice, link, section, and eight inside it
    assert dict(checked.tags)["table"]["aria-label"] == evil


def test_table_cells_show_two_digits_and_sort_by_full_value():
    page = Page("p")
    page.section("s")
    page.table((["class", "AP", "n"], [["a", 12.3456, 3], ["b", None, 10]]), "t")
    checked = check_page(page.render())
    cells = [attributes["data-value"] for tag, attributes in checked.tags if tag == "td"]
    assert cells == ["a", "12.3456", "3", "b", "", "10"]
    assert "12.35" in checked.texts and "–" in checked.texts
    assert sum(tag == "button" for tag, _ in checked.tags) == 3


def test_page_supports_small_and_dark_screens():
    text = Page("p").render()
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "default-src 'none'" in text


def test_writing_outside_a_section_raises():
    with pytest.raises(ValueError, match="no section"):
        Page("p").text("lost")
