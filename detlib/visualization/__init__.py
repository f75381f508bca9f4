"""Drawing of predictions, ground truth and segmentations on images, with matplotlib."""

from detlib.visualization.visualizer import ColorMode, VisImage, Visualizer

__all__ = ["ColorMode", "VisImage", "Visualizer"]
