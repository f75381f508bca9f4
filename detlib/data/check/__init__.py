"""Looking for all that is wrong with a data set: `python -m detlib.data.check ADDRESS [--fix OUT.json]`."""

from .checker import Checked, check_dataset
from .kinds import KINDS, Finding

__all__ = ["KINDS", "Checked", "Finding", "check_dataset"]
