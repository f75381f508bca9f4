"""Tests of the keypoint similarity against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detlib.evaluation.coco_metrics import make_keypoint_similarity


def make_objects(rng, count, num_keypoints, visible):
    objects = []
    for i in range(count):
        low, size = rng.uniform(0, 60, 2), rng.uniform(5, 40, 2)
        points = np.empty((num_keypoints, 3))
        points[:, :2] = low + rng.uniform(-0.5, 1.5, (num_keypoints, 2)) * size
        points[:, 2] = rng.integers(0, 3, num_keypoints) if i % 3 else visible
        objects.append(
            {
                "id": i + 1,
                "image_id": int(rng.integers(1, 4)),
                "category_id": 1,
                "bbox": [*low.tolist(), *size.tolist()],
                "area": float(size.prod() * 0.6),
                "iscrowd": int(i % 5 == 0),
                "num_keypoints": int((points[:, 2] > 0).sum()),
                "keypoints": points.reshape(-1).tolist(),
                "score": float(rng.integers(0, 4) / 4),  # some are equal
            }
        )
    return objects


@pytest.mark.parametrize("num_keypoints", [1, 17])
def test_similarity_equals_pycocotools(num_keypoints):
    rng = np.random.default_rng(num_keypoints)
    gt = make_objects(rng, 14, num_keypoints, visible=0)
    found = make_objects(rng, 90, num_keypoints, visible=2)
    sigmas = rng.uniform(0.02, 0.2, num_keypoints)
    images = [{"id": i} for i in (1, 2, 3, 4)]
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for objects in (gt, found):
            side = COCO()
            side.dataset = {"images": images, "annotations": objects, "categories": [{"id": 1}]}
            side.createIndex()
            sides.append(side)
        reference = COCOeval(*sides, "keypoints")
        reference.params.kpt_oks_sigmas = sigmas
        reference._prepare()
    compute = make_keypoint_similarity(gt, found, 20, sigmas)
    for image in images:
        want = reference.computeOks(image["id"], 1)
        np.testing.assert_allclose(compute(image["id"], 1), want, rtol=1e-13, atol=1e-15)
    assert compute(4, 1) == [] and len(compute(1, 1)) == 20
