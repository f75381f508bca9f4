"""How many training pictures of LVIS v1 each category is in."""

from __future__ import annotations

from detlib.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

__all__ = ["LVIS_CATEGORY_IMAGE_COUNT"]

LVIS_CATEGORY_IMAGE_COUNT = [
    {key: category[key] for key in ("id", "image_count")} for category in LVIS_CATEGORIES
]
