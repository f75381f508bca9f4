"""Annotation formats: one file each, found by this package on import.

A format's file calls `register_format` once. What it registers answers for dataset URIs (`coco:...`), for the
checker (`python -m detlib.data.check`), the converter (`python -m detlib.data.convert`) and the detection of
a folder's format (`dir:PATH`). `docs/data.md` lists the formats; see `Format` for writing another one.
"""

import importlib
import pkgutil

from detlib.data.formats.base import (
    FORMATS,
    Candidate,
    Format,
    ParsedURI,
    URIOption,
    register_format,
)
from detlib.data.formats.findings import FINDING_KINDS, Finding, RawSet
from detlib.data.formats.writing import ConversionSource

__all__ = [
    "FINDING_KINDS",
    "FORMATS",
    "Candidate",
    "ConversionSource",
    "Finding",
    "Format",
    "ParsedURI",
    "RawSet",
    "URIOption",
    "register_format",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
