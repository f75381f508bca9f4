"""Batches of padded images."""

import pytest
import torch

from detlib.structures import ImageList


def make_images():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 20, 31, generator=generator), torch.rand(3, 25, 12, generator=generator)]


@pytest.mark.parametrize(
    "divisor, size", [(0, (25, 31)), (1, (25, 31)), (8, (32, 32)), (16, (32, 32)), (5, (25, 35))]
)
def test_padded_size_and_values(divisor, size):
    images = make_images()
    batch = ImageList.from_tensors(images, divisor, pad_value=7.0)
    assert batch.tensor.shape == (2, 3, *size) and len(batch) == 2
    assert batch.image_sizes == [(20, 31), (25, 12)]
    for i, image in enumerate(images):
        assert torch.equal(batch[i], image)
        padding = torch.ones(size, dtype=torch.bool)
        padding[: image.shape[1], : image.shape[2]] = False
        assert (batch.tensor[i][:, padding] == 7.0).all()


def test_single_image_is_padded():
    image = make_images()[0]
    batch = ImageList.from_tensors([image], 32, pad_value=3.0)
    assert batch.tensor.shape == (1, 3, 32, 32) and torch.equal(batch[0], image)
    assert (batch.tensor[0, :, 20:] == 3).all() and (batch.tensor[0, :, :, 31:] == 3).all()


def test_padding_constraints_of_a_backbone():
    images = make_images()
    assert ImageList.from_tensors(images, 8, padding_constraints={"square_size": 64}).tensor.shape[-2:] == (
        64,
        64,
    )
    assert ImageList.from_tensors(images, 8, padding_constraints={"square_size": 0}).tensor.shape[-2:] == (
        32,
        32,
    )
    constraints = {"size_divisibility": 10, "square_size": 41}
    assert ImageList.from_tensors(images, 8, padding_constraints=constraints).tensor.shape[-2:] == (50, 50)
    with pytest.raises(ValueError, match=r"\(25, 31\).* square_size 30"):
        ImageList.from_tensors(images, padding_constraints={"square_size": 30})


def test_keeps_dtype_and_extra_dimensions():
    masks = [torch.ones(4, 5, dtype=torch.uint8), torch.ones(6, 3, dtype=torch.uint8)]
    batch = ImageList.from_tensors(masks, pad_value=255)
    assert batch.tensor.dtype == torch.uint8 and batch.tensor.shape == (2, 6, 5)
    assert batch.tensor[0, 5, 0] == 255
    assert batch.to(torch.float32).tensor.dtype == torch.float32


def test_wrong_images_are_reported():
    with pytest.raises(ValueError, match="at least one"):
        ImageList.from_tensors([])
    with pytest.raises(ValueError, match=r"\(3, 4, 4\) and \(1, 4, 4\)"):
        ImageList.from_tensors([torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)])
    with pytest.raises(TypeError, match="got str"):
        ImageList.from_tensors(["image"])
