"""The path under which the restricted unpickler is imported too; it is `detlib.utils.safe_pickle`."""

from detlib.utils.safe_pickle import load_plain_pickle

__all__ = ["load_plain_pickle"]
