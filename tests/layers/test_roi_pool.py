"""RoIPool against values computed by hand."""

import pytest
import torch

from detlib.layers import ROIPool


def test_roi_pool_is_the_maximum_of_each_bin():
    cells = torch.arange(64.0).view(1, 1, 8, 8)
    # From pixel 4 to 28 at scale 1/4: cells 1 to 7, inclusive; bins are 3.5 cells wide and share one.
    pooled = ROIPool(2, 0.25)(cells, torch.tensor([[0.0, 4, 4, 28, 28]]))
    assert pooled.flatten().tolist() == [4 * 8 + 4, 4 * 8 + 7, 7 * 8 + 4, 7 * 8 + 7]
    assert ROIPool((1, 3), 0.25)(cells, torch.zeros(0, 5)).shape == (0, 1, 1, 3)


def test_roi_pool_checks_the_shape_of_boxes():
    with pytest.raises(ValueError, match=r"rois.*\(K, 5\).*\(1, 4\)"):
        ROIPool(2, 1.0)(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4))
