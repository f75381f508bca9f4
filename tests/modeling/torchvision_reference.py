"""References for backbones from torchvision and timm."""

import torch
from torch import nn


def random_input(height, width, channels=3):
    """Return (2, C, H, W) float32."""
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(3))


def shapes(backbone):
    """Return {feature name: (channels, stride)}."""
    return {name: (spec.channels, spec.stride) for name, spec in backbone.output_shape().items()}


def torchvision_maps(net, x):
    """Return the feature maps of the stem and the four stages of a torchvision ResNet."""
    maps = []
    for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x = getattr(net, part)(x)
        if part == "relu" or part.startswith("layer"):
            maps.append(x.clone())
    return maps


def randomize_norms(model):
    """Give every BatchNorm2d random statistics and weights."""
    g = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=g))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=g))
            module.weight.data.copy_(0.5 + 0.3 * torch.rand(module.num_features, generator=g))
