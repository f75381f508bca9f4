"""Tests of the MViTv2 backbone: pooling attention against a reference, and the layout of its stages."""

import pytest
import torch
from torch.nn import functional as F

from detlib.modeling import FPN, MViT
from detlib.modeling.backbone import LastLevelMaxPool, utils
from detlib.modeling.backbone.mvit import MultiScaleAttention, MultiScaleBlock
from tests.modeling.transformer_reference import attention_weights, pad_to_multiple, randomize


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_mvit(**kwargs):
    settings = dict(
        img_size=64, embed_dim=8, depth=6, last_block_indexes=[0, 2, 4, 5], adaptive_window_size=8
    )
    return MViT(**(settings | kwargs))


# Attention


def slow_pool(x, weight, norm, stride):
    """Apply a zero-padded depthwise 3x3 convolution and a layer norm to one (H, W, D) feature map."""
    padded = x.new_zeros(x.shape[0] + 2, x.shape[1] + 2, x.shape[2])
    padded[1:-1, 1:-1] = x
    rows = []
    for i in range(0, x.shape[0], stride):
        row = [
            torch.einsum("ijd,dij->d", padded[i : i + 3, j : j + 3], weight[:, 0])
            for j in range(0, x.shape[1], stride)
        ]
        rows.append(torch.stack(row))
    return F.layer_norm(torch.stack(rows), x.shape[2:], norm.weight, norm.bias, norm.eps)


def slow_attention(attn, x, stride_q, stride_kv, windows):
    """Apply `MultiScaleAttention` to one (H, W, C) feature map, in loops.

    `windows` holds the side lengths of the windows of queries and keys. If it is None, the feature map must
    be square.
    """
    projected = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
    heads = []
    for head in range(attn.num_heads):
        q, k, v = (projected[:, :, i, head] for i in range(3))
        q = slow_pool(q, attn.pool_q.weight, attn.norm_q, stride_q)
        k = slow_pool(k, attn.pool_k.weight, attn.norm_k, stride_kv)
        v = slow_pool(v, attn.pool_v.weight, attn.norm_v, stride_kv)
        size_q, size_k = windows or (len(q), len(k))
        padded_q, k, v = pad_to_multiple(q, size_q), pad_to_multiple(k, size_k), pad_to_multiple(v, size_k)
        out = torch.zeros_like(padded_q)
        for i in range(padded_q.shape[0] // size_q):
            for j in range(padded_q.shape[1] // size_q):
                at_q = (slice(i * size_q, (i + 1) * size_q), slice(j * size_q, (j + 1) * size_q))
                at_k = (slice(i * size_k, (i + 1) * size_k), slice(j * size_k, (j + 1) * size_k))
                weights = attention_weights(padded_q[at_q], k[at_k], attn.rel_pos_h, attn.rel_pos_w)
                out[at_q] = torch.einsum("ijmn,mnd->ijd", weights, v[at_k])
        out = out[: q.shape[0], : q.shape[1]]
        heads.append(out + q if attn.residual_pooling else out)
    return attn.proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("fold_from", [0, 10**9])
@pytest.mark.parametrize(
    "stride_q, stride_kv, window, hw, residual",
    [
        (1, 2, 4, (8, 4), True),
        (1, 2, 4, (7, 5), True),  # padded windows
        (2, 1, 4, (6, 8), False),
        (2, 4, 4, (5, 8), True),
        (1, 2, 0, (6, 6), True),
        (2, 1, 0, (6, 6), True),
        (1, 1, 0, (5, 5), False),
    ],
)
def test_pooling_attention_matches_loops(stride_q, stride_kv, window, hw, residual, fold_from, monkeypatch):
    monkeypatch.setattr(utils, "_FOLD_FROM", fold_from)
    attn = MultiScaleAttention(
        6,
        8,
        num_heads=2,
        stride_q=stride_q,
        stride_kv=stride_kv,
        residual_pooling=residual,
        window_size=window,
        use_rel_pos=True,
        input_size=hw,
    )
    randomize(attn.double())
    x = rand(2, *hw, 6)
    windows = (window // stride_q, window // stride_kv) if window else None
    with torch.no_grad():
        expected = [slow_attention(attn, image, stride_q, stride_kv, windows) for image in x]
        torch.testing.assert_close(attn(x), torch.stack(expected))


@pytest.mark.parametrize("dim_out, stride", [(6, 1), (12, 1), (6, 2), (12, 2)])
def test_shortcut_is_pooled_and_projected(dim_out, stride):
    block = randomize(MultiScaleBlock(6, dim_out, num_heads=2, stride_q=stride, input_size=(8, 8)).double())
    x = rand(2, 7, 5, 6)
    with torch.no_grad():
        normed = block.norm1(x)
        skip = block.proj(normed) if dim_out != 6 else x
        if stride == 2:
            skip = F.pad(skip.permute(0, 3, 1, 2), (1, 1, 1, 1), value=float("-inf"))
            skip = skip.unfold(2, 3, 2).unfold(3, 3, 2).amax(dim=(-2, -1)).permute(0, 2, 3, 1)
        between = skip + block.attn(normed)
        torch.testing.assert_close(block(x), between + block.mlp(block.norm2(between)))


def test_window_size_that_is_not_a_multiple_of_strides_is_rejected():
    mvit = small_mvit(adaptive_window_size=6, adaptive_kv_stride=4)
    with pytest.raises(ValueError, match="not a multiple.*6 tokens wide for queries and 1 for keys;"):
        mvit(rand(1, 3, 64, 64, dtype=torch.float32))


# The backbone


def test_blocks_of_mvit_tiny_match_the_paper():
    """Compare strides, windows, heads and tables of each block with the paper and the published weights."""
    with torch.device("meta"):
        blocks = MViT(depth=10, last_block_indexes=(0, 2, 7, 9), drop_path_rate=0.2).blocks
    attns = [block.attn for block in blocks]
    assert [attn.num_heads for attn in attns] == [1, 2, 2, 4, 4, 4, 4, 4, 8, 8]
    assert [attn.proj.out_features for attn in attns] == [96, 192, 192] + [384] * 5 + [768] * 2
    assert [attn.pool_q.stride[0] for attn in attns] == [1, 2, 1, 2, 1, 1, 1, 1, 2, 1]
    assert [attn.pool_k.stride[0] for attn in attns] == [4, 2, 4, 1, 1, 1, 1, 2, 1, 1]
    assert [attn.window_size for attn in attns] == [56, 56, 0, 28, 14, 14, 14, 0, 14, 0]
    assert [len(attn.rel_pos_h) for attn in attns] == [111, 55, 55, 55, 27, 27, 27, 27, 27, 13]
    assert [round(block.drop_path.drop_prob, 6) for block in blocks] == pytest.approx(
        [0.2 * i / 9 for i in range(10)], abs=1e-6
    )


def test_stages_have_published_shapes_and_norms():
    mvit = randomize(small_mvit(), seed=3)
    shapes, out = mvit.output_shape(), mvit(rand(2, 3, 64, 96, dtype=torch.float32))
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == dict(
        scale2=(8, 4), scale3=(16, 8), scale4=(32, 16), scale5=(64, 32)
    )
    for name, spec in shapes.items():
        assert out[name].shape == (2, spec.channels, 64 // spec.stride, 96 // spec.stride)
        # Without the affine parameters of the final layer norm, every pixel has mean 0 and variance 1.
        norm = getattr(mvit, f"{name}_norm")
        plain = (out[name].permute(0, 2, 3, 1) - norm.bias) / norm.weight
        torch.testing.assert_close(plain.mean(-1), torch.zeros(plain.shape[:-1]), rtol=0, atol=1e-3)
        torch.testing.assert_close(
            plain.var(-1, correction=0), torch.ones(plain.shape[:-1]), rtol=0, atol=1e-2
        )


def test_only_out_features_have_a_norm():
    mvit = small_mvit(out_features=["scale3", "scale5"])
    assert {name for name, _ in mvit.named_children()} == {
        "patch_embed",
        "blocks",
        "scale3_norm",
        "scale5_norm",
    }
    assert list(mvit(rand(1, 3, 64, 64, dtype=torch.float32))) == ["scale3", "scale5"]


@pytest.mark.parametrize("kwargs", [dict(out_features=["scale6"]), dict(depth=5), dict(out_features=[])])
def test_unknown_out_features_are_rejected(kwargs):
    with pytest.raises(ValueError, match="out_features .* there are"):
        small_mvit(**kwargs)


def test_absolute_positions_are_added_to_patches():
    with_cls = small_mvit(use_abs_pos=True, pretrain_img_size=32, use_rel_pos=False)
    assert with_cls.pos_embed.shape == (1, 65, 8)
    assert not any("rel_pos" in name for name, _ in with_cls.named_parameters())
    plain = small_mvit(use_rel_pos=False)
    plain.load_state_dict({k: v for k, v in with_cls.state_dict().items() if k != "pos_embed"})
    x = rand(1, 3, 40, 48, dtype=torch.float32)
    plain.patch_embed.register_forward_hook(
        lambda module, args, out: out + utils.get_abs_pos(with_cls.pos_embed, True, (10, 12))
    )
    torch.testing.assert_close(plain(x), with_cls(x))


@pytest.mark.parametrize("hw", [(61, 83), (33, 130), (5, 9)])
def test_any_image_size_is_accepted(hw):
    out = small_mvit().eval()(rand(1, 3, *hw, dtype=torch.float32))
    height, width = hw
    for stride, name in ((4, "scale2"), (8, "scale3"), (16, "scale4"), (32, "scale5")):
        assert out[name].shape[-2:] == (-(-height // stride), -(-width // stride))
        assert out[name].isfinite().all()


@pytest.mark.parametrize("fold_from", [0, 10**9])
@pytest.mark.parametrize("mode", ["float64", "bfloat16", "autocast"])
def test_low_and_double_precision_match_float32(mode, fold_from, monkeypatch):
    monkeypatch.setattr(utils, "_FOLD_FROM", fold_from)
    torch.manual_seed(0)
    net = FPN(small_mvit(use_abs_pos=True), ["scale3", "scale4", "scale5"], 8, top_block=LastLevelMaxPool())
    x = rand(2, 3, 96, 64, dtype=torch.float32)
    expected = net(x)["p5"]
    dtype = torch.float64 if mode == "float64" else torch.bfloat16
    if mode == "autocast":
        with torch.autocast("cpu", dtype=dtype):
            features = net(x)
    else:
        features = net.to(dtype)(x.to(dtype))
        assert all(feature.dtype == dtype for feature in features.values())
    sum(feature.float().sum() for feature in features.values()).backward()
    unused = {"bottom_up.scale2_norm.weight", "bottom_up.scale2_norm.bias"}
    for name, parameter in net.named_parameters():
        assert name in unused or parameter.grad.isfinite().all(), name
    tolerance = 1e-5 if mode == "float64" else 0.1
    torch.testing.assert_close(features["p5"].float(), expected, rtol=0, atol=tolerance)


def test_activation_checkpointing_keeps_gradients():
    kept, recomputed = small_mvit(drop_path_rate=0.5), small_mvit(drop_path_rate=0.5, use_act_checkpoint=True)
    recomputed.load_state_dict(randomize(kept).state_dict())
    x, grads = rand(4, 3, 40, 48, dtype=torch.float32), []
    for mvit in (kept, recomputed):
        torch.manual_seed(0)
        sum(feature.square().mean() for feature in mvit(x).values()).backward()
        grads.append({name: p.grad for name, p in mvit.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])


def test_mvit_huge_builds_on_the_meta_device():
    with torch.device("meta"):
        mvit = MViT(
            embed_dim=192, depth=80, num_heads=3, last_block_indexes=(3, 11, 71, 79), drop_path_rate=0.6
        )
        out = mvit(torch.zeros(1, 3, 1024, 1024))
    assert all(p.is_meta for p in mvit.parameters())
    assert {name: feature.shape[1:] for name, feature in out.items()} == {
        "scale2": (192, 256, 256),
        "scale3": (384, 128, 128),
        "scale4": (768, 64, 64),
        "scale5": (1536, 32, 32),
    }
    assert 6.5e8 < sum(p.numel() for p in mvit.parameters()) < 6.8e8  # 667 million with the classifier
