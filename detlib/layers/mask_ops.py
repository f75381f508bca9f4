"""Pasting of fixed-size masks into images, re-exported from `detlib.ops` under detectron2's import path."""

from detlib.ops.paste_masks import paste_masks_in_image

__all__ = ["paste_masks_in_image"]
