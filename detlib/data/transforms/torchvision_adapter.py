"""Transforms of `torchvision.transforms.v2` as augmentations of this package.

A v2 transform draws its random numbers when it is called, for all data together. Here a seed is drawn
instead, and the transform runs once for each type of data, with that seed and with an image of the same size
as second input. Coordinates are passed as boxes without extent: as in this package, an image spans [0, W] for
boxes, while torchvision's keypoints are pixel indices.
"""

from typing import Any

import numpy as np
import torch
from fvcore.transforms.transform import Transform

from detlib.data.transforms.augmentation import Augmentation
from detlib.utils.env import seeded

__all__ = ["TorchvisionAugmentation", "TorchvisionTransform"]


class TorchvisionTransform(Transform):
    """A v2 transform with its random numbers fixed by a seed."""

    def __init__(self, transform: Any, seed: int, height: int, width: int, channels: int = 3):
        """
        Args:
            transform: callable of `torchvision.transforms.v2`.
            seed: seed of its random numbers.
            height, width, channels: size of the input images.
        """
        super().__init__()
        self._set_attributes(locals())

    def _run(self, kind: str, data: torch.Tensor, dtype: torch.dtype | None = torch.uint8) -> torch.Tensor:
        """Apply the v2 transform to ``data``, together with an image unless it is one."""
        from torchvision import tv_tensors

        image = tv_tensors.Image(torch.zeros(self.channels, self.height, self.width, dtype=dtype))
        sample = {"image": data} if kind == "images" else {"image": image, "data": data}
        with seeded(self.seed):
            try:
                out = self.transform(sample)["image" if kind == "images" else "data"]
            except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
                raise ValueError(
                    f"torchvision's {self.transform} cannot be applied to {kind}: {error}"
                ) from error
        if not isinstance(out, torch.Tensor):
            raise ValueError(
                f"torchvision's {self.transform} turns {kind} into {type(out).__name__}, no tensor"
            )
        return out

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Transform (H, W) or (H, W, C) images."""
        from torchvision import tv_tensors

        planes = img[None] if img.ndim == 2 else img.transpose(2, 0, 1)
        out = self._run("images", tv_tensors.Image(torch.from_numpy(planes.copy()))).numpy()
        return out[0] if img.ndim == 2 else out.transpose(1, 2, 0)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Transform (N, 2) xy coordinates."""
        from torchvision import tv_tensors

        points = torch.from_numpy(np.array(coords, dtype=np.float64)).reshape(-1, 2)
        if len(points) == 0:
            return points.numpy()
        boxes = tv_tensors.BoundingBoxes(
            points.repeat(1, 2),
            format="XYXY",
            canvas_size=(self.height, self.width),
            **(
                {"clamping_mode": None} if "clamping_mode" in tv_tensors.BoundingBoxes.__annotations__ else {}
            ),
        )
        out = self._run("coordinates", boxes)
        if out.shape != boxes.shape:
            raise ValueError(f"torchvision's {self.transform} drops coordinates, which is not supported")
        return out.numpy().astype(np.float64)[:, :2]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Transform an (H, W) integer or bool array."""
        from torchvision import tv_tensors

        mask = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(segmentation))[None])
        return self._run("segmentation masks", mask)[0].numpy()

    @property
    def mirrors(self) -> bool:
        """Return whether left and right are swapped."""
        origin, along_x, along_y = self.apply_coords(np.array([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]]))
        x, y = along_x - origin, along_y - origin
        return bool(x[0] * y[1] - x[1] * y[0] < 0 and x[0] < 0)


class TorchvisionAugmentation(Augmentation):
    """Any transform of `torchvision.transforms.v2`, photometric or geometric.

    Not supported are transforms of several images (CutMix, MixUp), and those that sample from boxes
    (RandomIoUCrop) or drop objects.
    """

    def __init__(self, transform: Any):
        """
        Args:
            transform: callable of `torchvision.transforms.v2`, such as a Compose. Photometric ones that
                distinguish the channels (hue, grayscale) need ``INPUT.FORMAT`` "RGB".

        Raises:
            TypeError: if the transform is not supported.
        """
        super().__init__()
        from torchvision.transforms import v2

        parts = [transform]
        for part in parts:  # the list grows by the contents of containers
            inner = getattr(part, "transforms", None)
            parts += inner if isinstance(inner, (list, tuple, torch.nn.ModuleList)) else []
        unsupported = (v2.CutMix, v2.MixUp, v2.RandomIoUCrop, v2.SanitizeBoundingBoxes)
        for part in parts:
            if isinstance(part, unsupported):
                raise TypeError(
                    f"TorchvisionAugmentation: {type(part).__name__} needs several images or boxes, or drops "
                    "objects, which is not supported; use an augmentation of this package instead"
                )
        if not callable(transform):
            raise TypeError(f"TorchvisionAugmentation: {type(transform).__name__} is not callable")
        self._init(locals())

    def get_transform(self, image) -> Transform:
        channels = 1 if image.ndim == 2 else image.shape[2]
        seed = int(np.random.randint(2**31))
        height, width = image.shape[:2]
        return TorchvisionTransform(self.transform, seed, height, width, channels)
