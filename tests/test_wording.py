"""The glossary of CONTRIBUTING.md: the usual terms of the field instead of words that puzzle a reader."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".md", ".cpp", ".cu", ".h", ".cuh", ".inc", ".yaml", ".toml", ""}

# Pattern (case is ignored): the term to use instead.
TRAINING = r"\b(a|another|each|every|one) training(?=[.,;:)]| (ends|goes|has|is|of|that|was|which)\b)"
GLOSSARY = {
    r"pictures?": "image; a drawn result is a visualization",
    r"(?<![a-z])truths?(?![a-z])": "ground truth",
    r"\bdata[ -]sets?\b": "dataset",
    r"\btrainings\b": "training runs",
    TRAINING: "training run",
    r"\bupright\b": "axis-aligned",
    r"\bshar(e|es|ed|ing) out\b": "shard, distribute, split across processes",
    r"\bforeign\b": "third-party",
    r"\bfalling scores?\b": "in descending score order",
    r"(?<!there )\b(is|are) no (?!longer|more|fewer|less|better|worse)[a-z]*": "is not a ...",
    r"\bma(de|ke|kes|king) up\b": "recomputed, re-run; built from",
    r"\b(un)?heed(ed|s)?\b": "ignored; respected",
    r"\b(nobody|somebody)\b": "name what reads or does it",
    r"\bgo(es|ing)? on from\b": "resumes from",
    r"\bas ever\b": "as before, unchanged",
    r"\bput(s|ting)? out\b": "write, report, output",
    r"\bunder way\b": "current step",
    r"\bmemory[- ]saving\b": "activation checkpointing",
    r"\bspoil(t|s|ed)?\b": "noised",
    r"\b(tells?|told|telling) of\b": "report, warn about",
    r"\bit is so that\b": "leave it out",
    r"\blet(s|ting)? go of\b": "release",
    r"\blook(s|ed|ing)? at\b": "read, inspect, check",
    r"\bhand(s|ed|ing)? on\b": "pass on, forward, re-export",
    r"\bat once\b": "immediately, in one call",
    r"\balike\b": "the same, equally",
    r"\banew\b": "again",
    r"\bbesides?\b": "next to, in addition to",
    r"\bsum(s|med|ming)? up\b": "accumulate, add",
    r"\bwhat (is|was|were) given\b": "the name of the thing",
    r"\bfor good\b": "permanently",
}
# Tables of names from outside, former names, seeds of stored test cases, and the glossary itself.
EXCLUDED = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "detlib/data/datasets/builtin_meta.py",
    "detlib/data/datasets/lvis_v0_5_categories.py",
    "detlib/data/datasets/lvis_v1_categories.py",
    "tests/conformance/synthetic.py",
    "tests/test_wording.py",
}


def tracked_files():
    """Return the text files of the project, as paths relative to its root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [Path(line) for line in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in SUFFIXES and path.as_posix() not in EXCLUDED]


def findings(text):
    """Yield (line, words, term) of every word of the glossary in a text."""
    for pattern, term in GLOSSARY.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            before = text[: match.start()].rstrip(" \n#*/-_").lower()
            if "truth" in pattern and before.endswith("ground"):
                continue
            yield text.count("\n", 0, match.start()) + 1, match[0], term


def test_words_of_the_glossary_are_not_used():
    found = []
    for path in tracked_files():
        if (ROOT / path).is_file():
            text = (ROOT / path).read_text(errors="replace")
            found += [f"{path}:{line}: {words!r}: write {term}" for line, words, term in findings(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text, words",
    [
        ("num_pictures", ["pictures"]),
        ("the ground\n    # truth boxes, the ground-truth boxes, ground_truth", []),
        ("true or truth", ["truth"]),
        ("a training run, a training step", []),
        ("ends a training.", ["a training"]),
        ("There is no file, and this is no longer one", []),
        ("this is no file", ["is no file"]),
    ],
)
def test_glossary_words_are_found_in_identifiers_and_prose(text, words):
    assert [found for _, found, _ in findings(text)] == words
