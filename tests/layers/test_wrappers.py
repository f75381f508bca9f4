"""Convolutions with norm and activation, and extensions of torch functions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers import (
    BatchNorm2d,
    CNNBlockBase,
    Conv2d,
    ConvTranspose2d,
    DepthwiseSeparableConv2d,
    FrozenBatchNorm2d,
    Linear,
    ROIAlign,
    ShapeSpec,
    cat,
    check_if_dynamo_compiling,
    cross_entropy,
    empty_input_loss_func_wrapper,
    get_norm,
    interpolate,
    move_device_like,
    nonzero_tuple,
    roi_align,
    shapes_to_tensor,
)


class TestConv2d:
    def test_norm_and_activation_come_after_the_convolution(self):
        torch.manual_seed(0)
        conv = Conv2d(3, 4, 3, stride=2, padding=1, norm=nn.GroupNorm(2, 4), activation=F.relu)
        x = torch.randn(2, 3, 8, 9)
        plain = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        assert torch.equal(conv(x), F.relu(conv.norm(plain)))
        assert set(conv.state_dict()) == {"weight", "bias", "norm.weight", "norm.bias"}

    def test_conv_without_norm_accepts_an_empty_batch(self):
        conv = Conv2d(3, 4, 3, bias=False)
        assert set(conv.state_dict()) == {"weight"}
        out = conv(torch.zeros(0, 3, 8, 8))
        assert out.shape == (0, 4, 6, 6)
        out.sum().backward()
        assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight))

    def test_padding_mode_is_respected(self):
        conv = Conv2d(1, 1, 3, padding=1, padding_mode="reflect", bias=False)
        expected = F.conv2d(F.pad(torch.eye(4)[None, None], (1, 1, 1, 1), mode="reflect"), conv.weight)
        torch.testing.assert_close(conv(torch.eye(4)[None, None]), expected)


def test_torch_names_are_re_exported():
    assert (BatchNorm2d, ConvTranspose2d, Linear) == (nn.BatchNorm2d, nn.ConvTranspose2d, nn.Linear)
    assert interpolate is F.interpolate


class TestCrossEntropy:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_matches_torch(self, reduction):
        logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
        weight = torch.tensor([1.0, 2.0, 3.0])
        expected = F.cross_entropy(logits, labels, reduction=reduction, weight=weight)
        assert torch.equal(cross_entropy(logits, labels, reduction=reduction, weight=weight), expected)

    def test_no_samples_give_zero_that_requires_grad(self):
        logits = torch.randn(0, 3, requires_grad=True)
        loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long))
        assert loss.item() == 0
        loss.backward()
        assert logits.grad.shape == (0, 3)

    def test_wrapper_accepts_other_losses(self):
        loss = empty_input_loss_func_wrapper(F.mse_loss)
        assert loss(torch.zeros(0), torch.zeros(0)).item() == 0
        assert loss(torch.ones(2), torch.zeros(2), reduction="sum").item() == 2


def test_cat_returns_a_single_tensor_without_copy():
    a, b = torch.zeros(1, 2), torch.ones(2, 2)
    assert cat([a]) is a
    assert torch.equal(cat([a, b]), torch.cat([a, b])) and cat((a, a), dim=1).shape == (1, 4)
    with pytest.raises(TypeError, match="got Tensor"):
        cat(a)


def test_nonzero_tuple_accepts_scalars():
    rows, columns = nonzero_tuple(torch.tensor([[0, 1], [1, 0]]))
    assert rows.tolist() == [0, 1] and columns.tolist() == [1, 0]
    assert nonzero_tuple(torch.tensor(5))[0].tolist() == [0]
    assert nonzero_tuple(torch.tensor(0))[0].tolist() == []


def test_shapes_to_tensor_and_move_device_like():
    assert shapes_to_tensor([3, 4]).tolist() == [3, 4] and shapes_to_tensor([3]).dtype == torch.int64
    assert shapes_to_tensor([torch.tensor(3), 4]).tolist() == [3, 4]
    assert shapes_to_tensor([3, 4], device="meta").device.type == "meta"
    assert shapes_to_tensor([]).shape == (0,)
    assert move_device_like(torch.zeros(1), torch.zeros(1, device="meta")).device.type == "meta"
    assert check_if_dynamo_compiling() is False


def test_shape_spec_fields_and_equality():
    spec = ShapeSpec(channels=3, stride=4)
    assert (spec.channels, spec.height, spec.width, spec.stride) == (3, None, None, 4)
    assert spec == ShapeSpec(3, None, None, 4)


class TestBlocks:
    def test_freeze_converts_norms_and_stops_gradients(self):
        class Block(CNNBlockBase):
            def __init__(self):
                super().__init__(3, 4, 2)
                self.conv = Conv2d(3, 4, 3, norm=get_norm("BN", 4))
                self.tail = nn.Sequential(nn.SyncBatchNorm(4), nn.GroupNorm(2, 4))

        block = Block()
        assert (block.in_channels, block.out_channels, block.stride) == (3, 4, 2)
        assert block.freeze() is block
        assert not any(p.requires_grad for p in block.parameters())
        assert type(block.conv.norm) is FrozenBatchNorm2d and type(block.tail[0]) is FrozenBatchNorm2d
        assert type(block.tail[1]) is nn.GroupNorm

    def test_depthwise_separable_conv_matches_two_convolutions(self):
        torch.manual_seed(0)
        block = DepthwiseSeparableConv2d(4, 6, 5, padding=2, norm1="BN", activation1=F.relu)
        x = torch.randn(2, 4, 8, 9)
        depthwise = F.conv2d(x, block.depthwise.weight, padding=2, groups=4)
        expected = F.conv2d(
            F.relu(block.depthwise.norm(depthwise)), block.pointwise.weight, block.pointwise.bias
        )
        torch.testing.assert_close(block.eval()(x), block.pointwise(F.relu(block.depthwise.norm(depthwise))))
        assert expected.shape == (2, 6, 8, 9)
        names = {"depthwise.weight", "pointwise.weight", "pointwise.bias"}
        assert {n for n in block.state_dict() if "norm" not in n} == names


class TestROIAlign:
    def test_module_matches_the_operator(self):
        x = torch.randn(2, 3, 16, 20)
        rois = torch.tensor([[0, 2.0, 3.0, 30.0, 20.0], [1, 0.0, 0.0, 10.0, 10.0]])
        pool = ROIAlign((5, 7), 0.5, 2, aligned=True)
        assert torch.equal(pool(x, rois), roi_align(x, rois, (5, 7), 0.5, 2, True))
        shifted = ROIAlign((5, 7), 0.5, 2, aligned=False)
        assert torch.equal(shifted(x, rois), roi_align(x, rois, (5, 7), 0.5, 2, False))
        assert not torch.equal(pool(x, rois), shifted(x, rois))
        assert "output_size=(5, 7), spatial_scale=0.5, sampling_ratio=2, aligned=True" in repr(pool)
        with pytest.raises(ValueError, match=r"\(R, 5\), got \(2, 4\)"):
            pool(x, rois[:, 1:])

    def test_linear_ramp_is_averaged_at_bin_centers(self):
        ramp = torch.arange(20.0).expand(1, 1, 16, 20)
        out = ROIAlign(4, 1.0, 0, aligned=True)(ramp, torch.tensor([[0, 2.0, 2.0, 10.0, 10.0]]))
        assert out[0, 0, 0].tolist() == [2.5, 4.5, 6.5, 8.5]
