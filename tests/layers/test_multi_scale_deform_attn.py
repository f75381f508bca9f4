"""The multi-scale deformable attention module."""

import math

import pytest
import torch

from detlib.layers import MultiScaleDeformableAttention
from detlib.layers.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from detlib.ops import ms_deform_attn

SHAPES = torch.tensor([[4, 6], [2, 3]])
STARTS = torch.tensor([0, 24])


def attention(**changes):
    torch.manual_seed(0)
    module = MultiScaleDeformableAttention(
        **{"embed_dim": 16, "num_heads": 4, "num_levels": 2, "num_points": 3, "batch_first": True} | changes
    ).eval()
    for layer in (module.sampling_offsets, module.attention_weights):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return module


def inputs(num_coordinates=2, queries=5):
    torch.manual_seed(1)
    return {
        "query": torch.randn(2, queries, 16),
        "value": torch.randn(2, 30, 16),
        "query_pos": torch.randn(2, queries, 16),
        "reference_points": torch.rand(2, queries, 2, num_coordinates),
        "spatial_shapes": SHAPES,
        "level_start_index": STARTS,
    }


def slow_attention(module, query, value, query_pos, reference_points, spatial_shapes, level_start_index):
    """Compute the module query by query and head by head, by the formula of the paper."""
    heads, levels, points = module.num_heads, module.num_levels, module.num_points
    size = module.embed_dim // heads
    projected = module.value_proj(value)
    moved = query + query_pos
    output = torch.zeros_like(query)
    for n in range(query.shape[0]):
        for q in range(query.shape[1]):
            offsets = module.sampling_offsets(moved[n, q]).view(heads, levels, points, 2)
            weights = module.attention_weights(moved[n, q]).view(heads, -1).softmax(-1)
            for m in range(heads):
                locations = torch.zeros(levels, points, 2)
                for lev in range(levels):
                    reference = reference_points[n, q, lev]
                    for p in range(points):
                        for axis in range(2):  # x, y
                            if len(reference) == 2:
                                step = 1 / spatial_shapes[lev, 1 - axis]
                            else:
                                step = reference[2 + axis] / 2 / points
                            locations[lev, p, axis] = reference[axis] + offsets[m, lev, p, axis] * step
                output[n, q, m * size : (m + 1) * size] = ms_deform_attn(
                    projected[n : n + 1, :, None, m * size : (m + 1) * size],
                    spatial_shapes,
                    level_start_index,
                    locations[None, None, None],
                    weights[m].view(1, 1, 1, levels, points),
                )[0, 0]
    return module.output_proj(output) + query


@pytest.mark.parametrize("num_coordinates", [2, 4])
@torch.no_grad()
def test_forward_matches_the_formula(num_coordinates):
    module, given = attention(), inputs(num_coordinates)
    expected = slow_attention(module, **given)
    torch.testing.assert_close(module(**given), expected)
    module.batch_first = False
    tensors = {name: given[name].transpose(0, 1) for name in ("query", "value", "query_pos")}
    torch.testing.assert_close(module(**given | tensors), expected.transpose(0, 1))


@torch.no_grad()
def test_optional_arguments_have_defaults():
    module, given = attention(), inputs(queries=30)
    given["value"] = None
    expected = module(**given)
    torch.testing.assert_close(expected, module(**given | {"value": given["query"]}))
    torch.testing.assert_close(
        expected, module(**given, identity=given["query"], key=given["query"], other=1)
    )
    without_identity = module(**given, identity=torch.zeros_like(given["query"]))
    torch.testing.assert_close(without_identity, expected - given["query"])
    moved = given | {"query": given["query"] + given["query_pos"], "query_pos": None}
    moved |= {"value": given["query"], "identity": given["query"]}
    torch.testing.assert_close(module(**moved), expected)


@torch.no_grad()
def test_padding_cells_are_zero():
    module, given = attention(), inputs()
    torch.nn.init.normal_(module.value_proj.bias)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[1, 20:] = True
    padded = module(**given, key_padding_mask=mask)
    changed = given["value"].clone()
    changed[1, 20:] = 100
    torch.testing.assert_close(module(**given | {"value": changed}, key_padding_mask=mask), padded)
    assert torch.equal(padded[0], module(**given)[0]) and not torch.allclose(padded[1], module(**given)[1])


def test_initial_parameters_match_the_paper():
    module = MultiScaleDeformableAttention()
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }
    assert module.dropout.p == 0.1 and not module.batch_first
    for name in (
        "sampling_offsets.weight",
        "attention_weights.weight",
        "attention_weights.bias",
        "value_proj.bias",
    ):
        assert not module.get_parameter(name).any()
    bound = math.sqrt(6 / 512)
    assert 0.9 * bound < module.value_proj.weight.abs().max() <= bound
    # Eight heads point to the eight neighbors, and the points of a head are 1 to 4 cells away.
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor(directions)[:, None, None] * torch.arange(1, 5)[:, None]
    offsets = module.sampling_offsets.bias.view(8, 4, 4, 2)
    torch.testing.assert_close(offsets, expected.expand(8, 4, 4, 2).float(), atol=1e-5, rtol=0)


def test_plain_pytorch_function_matches_the_operator():
    torch.manual_seed(0)
    value, locations = torch.randn(2, 30, 4, 8), torch.rand(2, 5, 4, 2, 3, 2)
    weights = torch.rand(2, 5, 4, 2, 3)
    torch.testing.assert_close(
        multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights),
        ms_deform_attn(value, SHAPES, STARTS, locations, weights),
    )


def test_autocast_keeps_float32_locations():
    module, given = attention(), inputs()
    plain = module(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(**given)
    mixed.sum().backward()
    torch.testing.assert_close(mixed.float(), plain, atol=5e-2, rtol=5e-2)
    assert module.sampling_offsets.weight.grad.isfinite().all()


@pytest.mark.parametrize("num_coordinates", [2, 4])
def test_exported_graph_contains_the_operator(num_coordinates):
    module, given = attention(), inputs(num_coordinates)
    exported = torch.export.export(module, (), given)
    assert "detlib.ms_deform_attn.default" in {str(node.target) for node in exported.graph.nodes}
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(**given), module(**given))


def test_exports_for_any_number_of_queries():
    module, given = attention(), inputs()
    shapes = {name: None for name in given}
    for name in ("query", "query_pos", "reference_points"):
        shapes[name] = {1: torch.export.Dim("queries", min=2)}
    exported = torch.export.export(module, (), given, dynamic_shapes=shapes | {"value": None}).module()
    more = inputs(queries=9)
    torch.testing.assert_close(exported(**more), module(**more))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"reference_points": None}, "reference_points must be a tensor"),
        ({"spatial_shapes": None}, "spatial_shapes must be a tensor"),
        ({"level_start_index": None}, "level_start_index must be a tensor"),
        (
            {"reference_points": torch.rand(2, 5, 2, 3)},
            r"reference_points must have shape .* got \(2, 5, 2, 3\)",
        ),
        (
            {"reference_points": torch.rand(2, 5, 1, 2)},
            "reference_points must have num_levels = 2 levels, got 1",
        ),
        ({"spatial_shapes": SHAPES[:1]}, "spatial_shapes must have num_levels = 2 levels, got 1"),
        ({"value": torch.rand(2, 29, 16)}, "spatial_shapes must add up to the 29 cells of value"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention()(**inputs() | change)


def test_num_heads_must_divide_embed_dim():
    with pytest.raises(ValueError, match="num_heads must divide embed_dim, got 3 and 256"):
        MultiScaleDeformableAttention(num_heads=3)
