"""All kinds of masks, from the files that define them."""

from .bit_masks import BitMasks
from .polygon_masks import PolygonMasks, polygon_area, polygons_to_bitmask, rasterize_polygons_within_box
from .roi_masks import ROIMasks

__all__ = [
    "BitMasks",
    "PolygonMasks",
    "ROIMasks",
    "polygon_area",
    "polygons_to_bitmask",
    "rasterize_polygons_within_box",
]
