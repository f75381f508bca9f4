"""detlib: object detection and segmentation in PyTorch, with detectron2's interface."""

import os
import sys

if "torch" not in sys.modules:
    # OpenMP reads it when torch is loaded. Threads that wait actively slow down each step several times as
    # soon as other processes use the same CPUs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
