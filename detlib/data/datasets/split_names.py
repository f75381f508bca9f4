"""The names that tools give to the validation split."""

__all__ = ["split_names"]

_VALIDATION = ("val", "valid", "validation")


def split_names(split: str) -> list[str]:
    """Return the names under which a split may be found, its own first: "val" is also "valid"."""
    return [split, *(name for name in _VALIDATION if split in _VALIDATION and name != split)]
