"""The dataset checker: finds all faults of a dataset (`python -m detlib.data.check URI [--fix OUT.json]`)."""

from detlib.data.check.checker import Checked, check_dataset
from detlib.data.formats.findings import FINDING_KINDS, Finding

__all__ = ["FINDING_KINDS", "Checked", "Finding", "check_dataset"]
