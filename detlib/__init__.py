"""detlib: object detection and segmentation in PyTorch, with detectron2's interface."""

import os
import sys

# OpenMP reads the variable when torch is loaded. On a busy machine, threads that wait actively slow down each
# step several times; on a quiet one, passive waiting costs 5 to 10 %.
if "torch" not in sys.modules and hasattr(os, "getloadavg"):
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
