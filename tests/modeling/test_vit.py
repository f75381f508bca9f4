"""Tests of the ViT backbone against reference formulas, of its pyramid, and of code shared with MViT."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detlib.modeling import MetaArchitecture, SimpleFeaturePyramid, ViT, get_vit_lr_decay_rate
from detlib.modeling.backbone import LastLevelMaxPool, utils
from detlib.modeling.backbone.utils import DropPath, drop_path_rates
from detlib.modeling.backbone.vit import Attention, Block
from tests.modeling.transformer_reference import attention_weights, pad_to_multiple, randomize


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_vit(**kwargs):
    settings = dict(
        img_size=64,
        patch_size=8,
        embed_dim=8,
        depth=3,
        num_heads=2,
        use_rel_pos=True,
        window_size=3,
        window_block_indexes=[0, 2],
        pretrain_img_size=32,
    )
    return ViT(**(settings | kwargs))


# Windows


@pytest.mark.parametrize("hw", [(6, 9), (7, 5), (2, 1)])
def test_windows_are_in_row_major_order_and_reversible(hw):
    x = rand(2, *hw, 4)
    windows, padded = utils.window_partition(x, 3)
    expected = []
    for image in x:
        image = pad_to_multiple(image, 3)
        for top in range(0, image.shape[0], 3):
            expected += [image[top : top + 3, left : left + 3] for left in range(0, image.shape[1], 3)]
    assert padded == tuple(image.shape[:2])
    torch.testing.assert_close(windows, torch.stack(expected), rtol=0, atol=0)
    assert torch.equal(utils.window_unpartition(windows, 3, padded, hw), x)


# Positions


@pytest.mark.parametrize("q_size, k_size", [(4, 4), (6, 3), (2, 6)])
def test_relative_positions_without_resizing(q_size, k_size):
    size = max(q_size, k_size)
    table = torch.arange(2 * size - 1.0)[:, None] - (size - 1)
    found = utils.get_rel_pos(q_size, k_size, table)[..., 0]
    # Distances are in units of the finer feature map, shifted by the position of the last key.
    last_key = (k_size - 1) * (size // k_size)
    for i in range(q_size):
        for j in range(k_size):
            assert found[i, j] == i * (size // q_size) - j * (size // k_size) + last_key - (size - 1)


def test_relative_positions_of_incommensurable_sizes():
    # 5 queries and 3 keys: keys are 5/3 apart, and distances are truncated to integers.
    table = torch.arange(9.0)[:, None]
    expected = [[int(i - j * 5 / 3 + 10 / 3 + 1e-5) for j in range(3)] for i in range(5)]
    assert utils.get_rel_pos(5, 3, table)[..., 0].tolist() == expected


@pytest.mark.parametrize("length", [5, 13])
def test_relative_position_tables_are_resized_linearly(length):
    table = rand(length, 3)
    at = (np.arange(7) + 0.5) * length / 7 - 0.5
    resized = np.stack([np.interp(at, np.arange(length), column) for column in table.numpy().T], axis=1)
    found = utils.get_rel_pos(4, 4, table)
    for i in range(4):
        for j in range(4):
            np.testing.assert_allclose(found[i, j], resized[i - j + 3], atol=1e-12)


@pytest.mark.parametrize("q_size, k_size", [((3, 4), (3, 4)), ((4, 6), (2, 3)), ((2, 3), (4, 3))])
def test_attention_with_decomposed_positions_matches_loops(q_size, k_size, monkeypatch):
    """Compare all three implementations and their gradients with loops."""
    q, k, v = rand(2, 3, *q_size, 5), rand(2, 3, *k_size, 5, seed=1), rand(2, 3, *k_size, 5, seed=2)
    tables = [
        rand(2 * max(a, b) - 1, 5, seed=i + 3).requires_grad_()
        for i, (a, b) in enumerate(zip(q_size, k_size))
    ]
    weights = torch.stack(
        [torch.stack([attention_weights(q[b, h], k[b, h], *tables) for h in range(3)]) for b in range(2)]
    )
    expected = torch.einsum("bhijmn,bhmnc->bhijc", weights, v).flatten(2, 3)
    expected_grads = torch.autograd.grad(expected.square().sum(), tables)

    flat_q, flat_k, flat_v = (t.flatten(2, 3) for t in (q, k, v))
    logits = (flat_q @ flat_k.mT / 5**0.5).flatten(0, 1)
    logits = utils.add_decomposed_rel_pos(logits, flat_q.flatten(0, 1), *tables, q_size, k_size)
    torch.testing.assert_close(
        logits.softmax(-1).view(2, 3, *logits.shape[1:]), weights.flatten(4).flatten(2, 3)
    )

    for fold_from in (0, 10**9):
        monkeypatch.setattr(utils, "_FOLD_FROM", fold_from)
        found = utils.decomposed_attention(flat_q, flat_k, flat_v, *tables, q_size, k_size)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), tables), expected_grads)
        with torch.no_grad():
            found = utils.decomposed_attention(flat_q, flat_k, flat_v, *tables, q_size, k_size)
        torch.testing.assert_close(found, expected)


def test_attention_without_positions_matches_loops():
    q = rand(1, 2, 6, 4)
    weights = torch.stack([attention_weights(t.view(2, 3, 4), t.view(2, 3, 4), None, None) for t in q[0]])
    expected = weights.view(2, 6, 6) @ q[0]
    found = utils.decomposed_attention(q, q, q, None, None, (2, 3), (2, 3))
    torch.testing.assert_close(found[0], expected)


def cubic_resize(row, size):
    """Resize a row of numbers by cubic convolution (a = -0.75), with half-pixel centers and edge padding."""

    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    out = []
    for i in range(size):
        at = (i + 0.5) * len(row) / size - 0.5
        first = int(np.floor(at)) - 1
        out.append(sum(kernel(at - j) * row[min(max(j, 0), len(row) - 1)] for j in range(first, first + 4)))
    return np.array(out)


@pytest.mark.parametrize("hw", [(7, 5), (4, 8), (2, 3)])
def test_absolute_positions_are_resized_bicubically(hw):
    table = rand(1, 17, 2)
    grid = table[0, 1:].view(4, 4, 2).numpy()
    for c in range(2):
        rows = np.stack([cubic_resize(row, hw[1]) for row in grid[..., c]])
        expected = np.stack([cubic_resize(column, hw[0]) for column in rows.T], axis=1)
        np.testing.assert_allclose(utils.get_abs_pos(table, True, hw)[0, ..., c], expected, atol=1e-12)


def test_absolute_positions_of_the_same_size_are_unchanged():
    table = rand(1, 17, 2)
    assert torch.equal(utils.get_abs_pos(table, True, (4, 4))[0].flatten(0, 1), table[0, 1:])
    assert torch.equal(utils.get_abs_pos(table[:, 1:], False, (4, 4))[0].flatten(0, 1), table[0, 1:])
    with pytest.raises(ValueError, match="17 positions"):
        utils.get_abs_pos(table, False, (4, 4))


# Blocks


def slow_attention(attn, x):
    """Apply `Attention` to one (H, W, C) feature map, in loops."""
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    heads = []
    for head in range(attn.num_heads):
        part = slice(head * q.shape[-1] // attn.num_heads, (head + 1) * q.shape[-1] // attn.num_heads)
        weights = attention_weights(q[..., part], k[..., part], attn.rel_pos_h, attn.rel_pos_w)
        heads.append(torch.einsum("ijmn,mnc->ijc", weights, v[..., part]))
    return attn.proj(torch.cat(heads, dim=-1))


def test_windowed_block_equals_a_loop_over_windows():
    block = randomize(Block(6, 2, use_rel_pos=True, window_size=3).double(), seed=1)
    x = rand(2, 4, 5, 6)
    expected = []
    for image in x:
        # Padding comes after the norm, so that the padding is zero.
        padded = pad_to_multiple(block.norm1(image), 3)
        for top in range(0, padded.shape[0], 3):
            for left in range(0, padded.shape[1], 3):
                window = padded[top : top + 3, left : left + 3]
                padded[top : top + 3, left : left + 3] = slow_attention(block.attn, window.clone())
        image = image + padded[:4, :5]
        hidden = F.gelu(F.linear(block.norm2(image), block.mlp.fc1.weight, block.mlp.fc1.bias))
        expected.append(image + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias))
    with torch.no_grad():
        torch.testing.assert_close(block(x), torch.stack(expected))


def test_propagation_block_is_initially_the_identity():
    block = Block(6, 2, use_residual_block=True, input_size=(4, 4)).double()
    plain = Block(6, 2, input_size=(4, 4)).double()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("residual.")})
    x = rand(2, 4, 5, 6)
    torch.testing.assert_close(block(x), plain(x))  # a new block is the identity

    residual = randomize(block.residual, seed=2)
    before = plain(x).permute(0, 3, 1, 2)
    out = before
    for i in (1, 2, 3):
        out = F.conv2d(out, getattr(residual, f"conv{i}").weight, padding=int(i == 2))
        norm = getattr(residual, f"norm{i}")
        out = F.layer_norm(out.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, 1e-6)
        out = out.permute(0, 3, 1, 2)
        if i < 3:
            out = F.gelu(out)
    torch.testing.assert_close(block(x), (before + out).permute(0, 2, 3, 1))


def test_drop_path_drops_images_and_keeps_the_mean():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    out = drop(x).flatten(1)
    assert ((out == 0).all(1) | torch.isclose(out, torch.tensor(1 / 0.75)).all(1)).all()
    assert abs(out.mean() - 1) < 0.03
    assert drop.eval()(x) is x
    assert (DropPath(1.0)(x) == 0).all()
    with pytest.raises(ValueError, match="1.5"):
        DropPath(1.5)
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3]) and drop_path_rates(0.3, 1) == [0]


# The backbone


def test_vit_equals_its_modules_in_sequence():
    vit = randomize(small_vit(norm_layer=partial(nn.LayerNorm, eps=1e-6)).double()).eval()
    x = rand(1, 3, 40, 36)
    with torch.no_grad():
        tokens = F.unfold(x[..., :32], 8, stride=8)[0].T @ vit.patch_embed.proj.weight.flatten(1).T
        tokens = (tokens + vit.patch_embed.proj.bias).view(1, 5, 4, 8)
        tokens = tokens + utils.get_abs_pos(vit.pos_embed, True, (5, 4))
        for i, size in enumerate([3, 8, 3]):
            block = Block(8, 2, use_rel_pos=True, window_size=size % 8, input_size=(size, size))
            block.norm1.eps = block.norm2.eps = 1e-6
            block.double().load_state_dict(vit.blocks[i].state_dict())
            tokens = block(tokens)
        torch.testing.assert_close(vit(x), {"last_feat": tokens.permute(0, 3, 1, 2)})


def test_parameters_have_published_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in small_vit(residual_block_indexes=[1]).named_parameters()}
    assert shapes["pos_embed"] == (1, 17, 8)
    assert shapes["patch_embed.proj.weight"] == (8, 3, 8, 8)
    assert [shapes[f"blocks.{i}.attn.rel_pos_h"] for i in range(3)] == [(5, 4), (15, 4), (5, 4)]
    assert shapes["blocks.2.attn.qkv.bias"] == (24,) and shapes["blocks.0.mlp.fc2.weight"] == (8, 32)
    assert shapes["blocks.1.residual.conv2.weight"] == (4, 4, 3, 3)
    assert not any("residual" in name for name in shapes if not name.startswith("blocks.1."))
    plain = dict(small_vit(use_rel_pos=False, use_abs_pos=False, qkv_bias=False).named_parameters())
    assert not any("pos" in name or name.endswith("qkv.bias") for name in plain)
    assert small_vit(pretrain_use_cls_token=False).pos_embed.shape == (1, 16, 8)


def test_initial_weights_have_the_documented_distribution():
    torch.manual_seed(0)
    vit = small_vit(embed_dim=64)
    assert abs(vit.blocks[0].mlp.fc1.weight.std() - 0.02) < 1e-3 and abs(vit.pos_embed.std() - 0.02) < 2e-3
    assert not vit.blocks[0].mlp.fc1.bias.any() and not vit.blocks[0].attn.rel_pos_h.any()
    assert small_vit(rel_pos_zero_init=False).blocks[1].attn.rel_pos_w.any()


@pytest.mark.parametrize("hw", [(64, 64), (61, 83), (8, 130), (16, 9)])
def test_any_image_size_is_accepted(hw):
    out = small_vit().eval()(rand(1, 3, *hw, dtype=torch.float32))["last_feat"]
    assert out.shape == (1, 8, hw[0] // 8, hw[1] // 8) and out.isfinite().all()


@pytest.mark.parametrize("fold_from", [0, 10**9])
@pytest.mark.parametrize("mode", ["float64", "bfloat16", "autocast"])
def test_low_and_double_precision_match_float32(mode, fold_from, monkeypatch):
    monkeypatch.setattr(utils, "_FOLD_FROM", fold_from)
    vit = small_vit(residual_block_indexes=[1])
    x = rand(2, 3, 72, 40, dtype=torch.float32)
    expected = vit(x)["last_feat"]
    dtype = torch.float64 if mode == "float64" else torch.bfloat16
    if mode == "autocast":
        with torch.autocast("cpu", dtype=dtype):
            out = vit(x)["last_feat"]
    else:
        out = vit.to(dtype)(x.to(dtype))["last_feat"]
        assert out.dtype == dtype
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.parameters())
    tolerance = 1e-5 if mode == "float64" else 0.05
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)


def test_activation_checkpointing_keeps_gradients():
    kept, recomputed = small_vit(drop_path_rate=0.5), small_vit(drop_path_rate=0.5, use_act_checkpoint=True)
    recomputed.load_state_dict(randomize(kept).state_dict())
    x, grads = rand(4, 3, 40, 48, dtype=torch.float32), []
    for vit in (kept, recomputed):
        torch.manual_seed(0)
        vit(x)["last_feat"].square().sum().backward()
        grads.append({name: p.grad for name, p in vit.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])


def test_vit_huge_builds_on_the_meta_device():
    with torch.device("meta"):
        windows = [i for i in range(32) if i % 8 != 7]
        vit = ViT(
            embed_dim=1280,
            depth=32,
            num_heads=16,
            drop_path_rate=0.5,
            window_size=14,
            window_block_indexes=windows,
            use_rel_pos=True,
        )
        out = vit(torch.zeros(1, 3, 1024, 1024))["last_feat"]
    assert all(p.is_meta for p in vit.parameters()) and out.shape == (1, 1280, 64, 64)
    assert vit.blocks[31].drop_path.drop_prob == 0.5
    # ViT-H/14 has 630.8 million without class token and head; patches of 16 and relative positions differ.
    assert 6.3e8 < sum(p.numel() for p in vit.parameters()) < 6.4e8


def test_heads_that_do_not_divide_channels_are_rejected():
    with pytest.raises(ValueError, match="num_heads 3 does not divide the 8"):
        small_vit(num_heads=3)
    with pytest.raises(ValueError, match="does not divide"):
        Attention(10, num_heads=4)


# The pyramid


def pyramid(**kwargs):
    settings = dict(in_feature="last_feat", out_channels=16, scale_factors=(4.0, 2.0, 1.0, 0.5))
    return SimpleFeaturePyramid(small_vit(patch_size=16, pretrain_img_size=64), **(settings | kwargs))


def test_pyramid_strides_and_channels():
    net = pyramid(top_block=LastLevelMaxPool())
    shapes = net.output_shape()
    out = net(rand(2, 3, 96, 64, dtype=torch.float32))
    assert {name: spec.stride for name, spec in shapes.items()} == dict(p2=4, p3=8, p4=16, p5=32, p6=64)
    assert list(out) == list(shapes)
    for name, spec in shapes.items():
        assert out[name].shape == (2, 16, -(-96 // spec.stride), 64 // spec.stride), name
        assert spec.channels == 16


def test_pyramid_levels_match_their_formulas():
    net = randomize(pyramid()).eval()
    x = rand(1, 3, 64, 96, dtype=torch.float32)
    with torch.no_grad():
        feature, out = net.net(x)["last_feat"], net(x)
        p2, p5 = net.simfp_2, net.simfp_5
        up = F.conv_transpose2d(feature, p2[0].weight, p2[0].bias, stride=2)
        up = F.conv_transpose2d(F.gelu(p2[1](up)), p2[3].weight, p2[3].bias, stride=2)
        torch.testing.assert_close(out["p2"], p2[5](p2[4](up)))
        torch.testing.assert_close(out["p5"], p5[2](p5[1](F.max_pool2d(feature, 2))))
    names = {name for name, _ in net.named_parameters() if name.startswith("simfp_4")}
    assert names == {f"simfp_4.{i}.{rest}" for i in (0, 1) for rest in ("weight", "norm.weight", "norm.bias")}


def test_pyramid_without_norm_keeps_parameter_names():
    names = {name for name, _ in pyramid(norm="").named_parameters() if name.startswith("simfp_2")}
    assert names == {f"simfp_2.{i}.{kind}" for i in (0, 3, 4, 5) for kind in ("weight", "bias")}


@pytest.mark.parametrize("square_pad, padded", [(0, (50, 70)), (128, (128, 128))])
def test_images_are_padded_only_to_square_pad(square_pad, padded):
    net = pyramid(square_pad=square_pad)
    model = MetaArchitecture()
    model.register_pixel_stats([0.0] * 3, [1.0] * 3)
    model.backbone = net
    images = model.preprocess_image([{"image": torch.ones(3, 50, 70)}, {"image": torch.ones(3, 33, 65)}])
    assert images.tensor.shape == (2, 3, *padded)
    patches = [side // 16 for side in padded]
    assert net(images.tensor)["p5"].shape[-2:] == (patches[0] // 2, patches[1] // 2)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(in_feature="res4"), "in_feature 'res4': the network has .*last_feat"),
        (dict(scale_factors=(2.0, 0.5)), "each half the previous one; got .2.0, 0.5"),
        (dict(scale_factors=(8.0, 4.0)), "got 8.0"),
        (dict(scale_factors=()), "each half"),
    ],
)
def test_illegal_pyramid_arguments_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pyramid(**kwargs)


def test_pyramid_rejects_strides_other_than_powers_of_two():
    with pytest.raises(ValueError, match=r"powers of two.*\[3, 6\]"):
        SimpleFeaturePyramid(small_vit(patch_size=6), "last_feat", 8, (2.0, 1.0))


# Training


@pytest.mark.parametrize(
    "name, blocks_above",
    [
        ("backbone.net.pos_embed", 13),
        ("backbone.net.patch_embed.proj.weight", 13),
        ("backbone.net.blocks.0.norm1.bias", 12),
        ("backbone.net.blocks.11.attn.rel_pos_h", 1),
        ("backbone.net.blocks.11.residual.conv1.weight", 0),
        ("backbone.simfp_2.0.weight", 0),
        ("roi_heads.box_head.fc1.weight", 0),
    ],
)
def test_learning_rate_decays_with_blocks_above(name, blocks_above):
    assert get_vit_lr_decay_rate(name, 0.7, 12) == pytest.approx(0.7**blocks_above)
    assert get_vit_lr_decay_rate(name) == 1
