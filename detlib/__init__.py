"""detlib: object detection and segmentation in PyTorch, with detectron2's interface."""

__version__ = "0.1.0"
