"""The number of training images of LVIS v1 with each category."""

from __future__ import annotations

from detlib.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

__all__ = ["LVIS_CATEGORY_IMAGE_COUNT"]

LVIS_CATEGORY_IMAGE_COUNT = [
    {key: category[key] for key in ("id", "image_count")} for category in LVIS_CATEGORIES
]
