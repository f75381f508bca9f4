"""Pasting of fixed-size masks, predicted in boxes, into images: detectron2's import path."""

from detlib.ops.paste_masks import paste_masks_in_image

__all__ = ["paste_masks_in_image"]
