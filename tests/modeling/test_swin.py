"""Tests of the Swin Transformer against torchvision, and of its attention against loops over tokens."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from detlib.modeling.backbone import FPN, LastLevelMaxPool, SwinTransformer
from detlib.modeling.backbone.swin import (
    BasicLayer,
    PatchEmbed,
    PatchMerging,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)


def small(**kwargs):
    arguments = {
        "embed_dim": 8,
        "depths": (2, 1, 3),
        "num_heads": (2, 4, 4),
        "window_size": 4,
        "drop_path_rate": 0.0,
        "out_indices": (0, 1, 2),
    }
    return SwinTransformer(**arguments | kwargs)


def randomize(model, std=0.3):
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += std * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


def from_torchvision(state):
    """Convert a state dict of torchvision's Swin Transformer, which has a norm of the last feature only."""
    out = {}
    for name, value in state.items():
        name = name.replace("features.0.0.", "patch_embed.proj.").replace(
            "features.0.2.", "patch_embed.norm."
        )
        name = re.sub(r"features\.(\d+)\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.", name)
        name = re.sub(r"features\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample.", name)
        name = name.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        if name.endswith("relative_position_index"):
            value = value.view(16, 16)
        out[re.sub(r"^norm\.", "norm2.", name)] = value
    return {k: v for k, v in out.items() if not k.startswith("head.")}


@pytest.mark.parametrize("height, width", [(76, 68), (76, 100), (92, 84)])
def test_features_match_torchvision(height, width):
    torch.manual_seed(0)
    theirs = TorchvisionSwin([4, 4], 8, [2, 1, 3], [2, 4, 4], [4, 4], stochastic_depth_prob=0.0).eval()
    randomize(theirs, 0.05)
    ours = small(out_indices=(2,)).eval()
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    image = torch.randn(2, 3, height, width)
    with torch.no_grad():
        want = theirs.permute(theirs.norm(theirs.features(image)))
        got = ours(image)
    assert list(got) == ["p2"]
    torch.testing.assert_close(got["p2"], want, rtol=1e-3, atol=1e-4)


def attention_by_loops(attn, x, shift):
    """Compute window attention head by head and token by token, on (H, W, C) of whole windows.

    Tokens belong to the same window if the quotients of their shifted coordinates and the window size are
    equal; so tokens before the shift form their own windows.
    """
    H, W, C = x.shape
    side, dim = attn.window_size[0], C // attn.num_heads
    out = torch.zeros(H, W, C, dtype=x.dtype)
    q, k, v = attn.qkv(x).split(C, dim=-1)
    tokens = [(y, z) for y in range(H) for z in range(W)]
    windows = {}
    for y, z in tokens:
        windows.setdefault(((y - shift) // side, (z - shift) // side), []).append((y, z))
    for head in range(attn.num_heads):
        part = slice(head * dim, (head + 1) * dim)
        for y, z in tokens:
            neighbors = windows[(y - shift) // side, (z - shift) // side]
            logits = []
            for my, mz in neighbors:
                row = (y - my + side - 1) * (2 * side - 1) + (z - mz + side - 1)
                bias = attn.relative_position_bias_table[row, head]
                logits.append(attn.scale * q[y, z, part] @ k[my, mz, part] + bias)
            weights = torch.stack(logits).softmax(0)
            out[y, z, part] = sum(w * v[my, mz, part] for w, (my, mz) in zip(weights, neighbors))
    return attn.proj(out)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("height, width", [(3, 3), (7, 5), (2, 8)])
def test_block_matches_loops_over_tokens(shift, height, width):
    torch.manual_seed(0)
    layer = BasicLayer(6, 2, 2, window_size=3, qk_scale=0.7).double()
    block = SwinTransformerBlock(6, 2, window_size=3, shift_size=shift, qk_scale=0.7).double()
    layer.shift_size, layer.blocks = shift, nn.ModuleList([randomize(block)])
    x = torch.randn(2, height * width, 6, dtype=torch.float64)
    with torch.no_grad():
        got = layer(x, height, width)[0]
        for i in range(2):
            image = x[i].view(height, width, 6)
            padded = F.pad(block.norm1(image), (0, 0, 0, -width % 3, 0, -height % 3))
            want = image + attention_by_loops(block.attn, padded, shift)[:height, :width]
            want = want + block.mlp(block.norm2(want))
            torch.testing.assert_close(got[i], want.flatten(0, 1), rtol=1e-9, atol=1e-9)


def test_every_second_block_is_shifted():
    layer = BasicLayer(6, 4, 2, window_size=7)
    assert [block.shift_size for block in layer.blocks] == [0, 3, 0, 3]


def test_windows_are_in_row_major_order_and_reversible():
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = window_partition(x, 2)
    assert windows.shape == (12, 2, 2, 1) and windows[4].flatten().tolist() == [14, 15, 20, 21]
    assert windows[6].flatten().tolist() == [24, 25, 30, 31]
    assert torch.equal(window_reverse(windows, 2, 4, 6), x)


def test_attention_without_qkv_bias_and_with_rectangular_window():
    torch.manual_seed(0)
    attn = WindowAttention(4, (2, 3), 2, qkv_bias=False)
    assert attn.qkv.bias is None and attn.relative_position_bias_table.shape == (3 * 5, 2)
    index = attn.relative_position_index
    # Each offset has its own row.
    assert index[0, 0] == index[5, 5] == 1 * 5 + 2 and index[5, 0] == 14 and index[0, 5] == 0
    assert attn(torch.randn(3, 6, 4)).shape == (3, 6, 4)


def test_patch_merging_concatenates_2x2_squares():
    torch.manual_seed(0)
    merging = randomize(PatchMerging(4))
    x = torch.randn(1, 3 * 5, 4)
    image = F.pad(x.view(3, 5, 4), (0, 0, 0, 1, 0, 1))
    got = merging(x, 3, 5).view(2, 3, 8)
    for y in range(2):
        for z in range(3):
            four = [image[2 * y + dy, 2 * z + dz] for dy, dz in ((0, 0), (1, 0), (0, 1), (1, 1))]
            torch.testing.assert_close(got[y, z], merging.reduction(merging.norm(torch.cat(four))))
    with pytest.raises(ValueError, match="15 tokens for a feature map of 4 x 4"):
        merging(x, 4, 4)


def test_images_are_padded_to_whole_patches():
    embed = PatchEmbed(4, 3, 5, nn.LayerNorm)
    x = torch.randn(1, 3, 9, 7)
    want = F.conv2d(F.pad(x, (0, 1, 0, 3)), embed.proj.weight, embed.proj.bias, stride=4)
    got = embed(x)
    torch.testing.assert_close(got, F.layer_norm(want.permute(0, 2, 3, 1), (5,)).permute(0, 3, 1, 2))


def test_parameters_have_published_names_and_shapes():
    with torch.device("meta"):
        net = SwinTransformer(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    state = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    block = "layers.2.blocks.17."
    want = {
        "patch_embed.proj.weight": (128, 3, 4, 4),
        "patch_embed.norm.bias": (128,),
        "layers.1.downsample.reduction.weight": (512, 1024),
        "layers.1.downsample.norm.weight": (1024,),
        block + "norm1.weight": (512,),
        block + "attn.relative_position_bias_table": (169, 16),
        block + "attn.relative_position_index": (49, 49),
        block + "attn.qkv.bias": (1536,),
        block + "attn.proj.weight": (512, 512),
        block + "norm2.bias": (512,),
        block + "mlp.fc1.weight": (2048, 512),
        block + "mlp.fc2.weight": (512, 2048),
        "norm0.weight": (128,),
        "norm3.bias": (1024,),
    }
    assert {k: state.get(k) for k in want} == want
    assert len(state) == 4 + 24 * 14 + 3 * 3 + 4 * 2
    # The published classifier without its last layer, plus three norms.
    assert sum(p.numel() for p in net.parameters()) == 86_743_224 + 2 * (128 + 256 + 512)
    shapes = net.output_shape()
    assert [(k, s.channels, s.stride) for k, s in shapes.items()] == [
        ("p0", 128, 4), ("p1", 256, 8), ("p2", 512, 16), ("p3", 1024, 32)
    ]  # fmt: skip
    assert net.size_divisibility == 32


def test_selected_stages_and_odd_sizes():
    net = small(out_indices=[0, 2]).eval()
    out = net(torch.randn(1, 3, 37, 50))
    assert {k: tuple(v.shape) for k, v in out.items()} == {"p0": (1, 8, 10, 13), "p2": (1, 32, 3, 4)}
    assert not hasattr(net, "norm1")
    assert out["p0"].permute(0, 2, 3, 1).mean(-1).abs().max() < 1e-5  # normalized


def test_padding_does_not_change_earlier_windows():
    net = small(depths=(1,), num_heads=(2,), out_indices=(0,)).eval()
    x = torch.randn(1, 3, 32, 48)
    wider = F.pad(x, (0, 16))
    torch.testing.assert_close(net(wider)["p0"][..., :12], net(x)["p0"])


def test_absolute_position_embedding_is_resized():
    torch.manual_seed(0)
    net = small(ape=True, pretrain_img_size=(32, 48), depths=(1,), num_heads=(2,), out_indices=(0,)).eval()
    assert net.absolute_pos_embed.shape == (1, 8, 8, 12) and net.absolute_pos_embed.abs().max() > 0
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        embedded = net.patch_embed(x) + F.interpolate(net.absolute_pos_embed, size=(16, 16), mode="bicubic")
        want = net.norm0(net.layers[0](embedded.flatten(2).transpose(1, 2), 16, 16)[0])
        torch.testing.assert_close(net(x)["p0"].flatten(2).transpose(1, 2), want)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 2, 3])
def test_frozen_stages_do_not_train(frozen_stages):
    net = small(frozen_stages=frozen_stages, ape=True, drop_rate=0.1).train()
    parts = [net.patch_embed.parameters(), [net.absolute_pos_embed], *(m.parameters() for m in net.layers)]
    for i, part in enumerate(parts):
        assert all(p.requires_grad == (i > frozen_stages) for p in part)
    assert net.patch_embed.training == (frozen_stages < 0)
    assert net.pos_drop.training == (frozen_stages < 2)
    assert [m.training for m in net.layers] == [frozen_stages < 2, frozen_stages < 3, True]
    assert not any(m.training for m in net.eval().modules())


def test_drop_path_rates_rise_linearly():
    net = SwinTransformer(drop_path_rate=0.22)
    rates = [block.drop_path.drop_prob for layer in net.layers for block in layer.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    assert SwinTransformer(depths=[1], num_heads=[3], out_indices=[0]).layers[0].blocks[0].drop_path


def test_activation_checkpointing_keeps_gradients():
    x = torch.randn(2, 3, 40, 40)
    grads = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        net = small(use_checkpoint=use_checkpoint, drop_path_rate=0.5)
        torch.manual_seed(1)
        net(x)["p2"].square().sum().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[1], grads[0])


def test_low_and_double_precision_match_float32():
    torch.manual_seed(0)
    net = randomize(small(ape=True), 0.05).eval()
    x = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        want = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = net(x)
        double, half = net.double()(x.double()), net.bfloat16()(x.bfloat16())
    for name, value in want.items():
        torch.testing.assert_close(double[name].float(), value, rtol=1e-3, atol=1e-4)
        assert half[name].dtype == torch.bfloat16
        for low in (autocast[name], half[name]):
            assert (low.float() - value).abs().mean() < 0.03


def test_runs_on_the_meta_device_and_compiles_to_one_graph():
    with torch.device("meta"):
        assert small()(torch.zeros(1, 3, 30, 30))["p2"].shape == (1, 32, 2, 2)
    net = small(depths=(2,), num_heads=(2,), out_indices=(0,)).eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=False)
    for size in (33, 50):
        x = torch.randn(1, 3, size, 40)
        torch.testing.assert_close(compiled(x), net(x))
    net.double()
    torch.testing.assert_close(compiled(x.double()), net(x.double()))


def test_fpn_on_swin_trains():
    net = small(depths=(1, 2), num_heads=(2, 4), out_indices=(0, 1), drop_path_rate=0.2)
    fpn = FPN(net, ["p0", "p1"], 16, norm="LN", top_block=None, square_pad=64)
    out = fpn(torch.randn(2, 3, 64, 64))
    assert {k: tuple(v.shape[1:]) for k, v in out.items()} == {"p2": (16, 16, 16), "p3": (16, 8, 8)}
    sum(v.square().sum() for v in out.values()).backward()
    assert all(p.grad is not None for p in fpn.parameters())
    assert LastLevelMaxPool().in_feature == "p5"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: small(num_heads=(2, 4)), r"num_heads \[2, 4\] and depths \[2, 1, 3\]"),
        (lambda: small(out_indices=(0, 3)), r"out_indices \[0, 3\] must be among the stages 0 to 2"),
        (lambda: small(out_indices=()), r"out_indices \[\]"),
        (lambda: small(num_heads=(3, 4, 4)), "3 heads for 8 channels"),
        (lambda: SwinTransformerBlock(8, 2, 4, 4), r"shift_size must be in \[0, 4\), .* got 4"),
    ],
)
def test_illegal_arguments_are_rejected(make, words):
    with pytest.raises(ValueError, match=words):
        make()
