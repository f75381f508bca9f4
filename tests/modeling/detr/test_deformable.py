"""Tests of the multi-scale transformers: positions of cells, proposals, references and refinement."""

import math

import pytest
import torch

from detlib.layers import get_sine_pos_embed, inverse_sigmoid
from detlib.modeling.detr.deformable_layers import cell_centers, flatten_levels, refine_boxes, valid_ratio
from detlib.modeling.detr.query_detector import padding_masks
from detlib.structures import ImageList
from tests.modeling.detr.small_models import DIM, MODELS, batch, small_deformable_detr, small_dino

SHAPES = [(4, 6), (2, 3)]
# The (height, width) in cells that each of two images fills on each level.
FILLED = [[(4, 6), (2, 3)], [(3, 2), (2, 1)]]


def masks():
    result = []
    for level, (height, width) in enumerate(SHAPES):
        mask = torch.ones(2, height, width, dtype=torch.bool)
        for image in range(2):
            h, w = FILLED[image][level]
            mask[image, :h, :w] = False
        result.append(mask)
    return result


def slow_centers():
    """Return x and y of all cells as fractions of their image, computed in loops."""
    rows = []
    for image in range(2):
        rows.append([])
        for level, (height, width) in enumerate(SHAPES):
            h, w = FILLED[image][level]
            rows[-1] += [((x + 0.5) / w, (y + 0.5) / h) for y in range(height) for x in range(width)]
    return torch.tensor(rows)


def test_padding_masks_cover_the_padding():
    images = ImageList(torch.zeros(2, 3, 4, 5), [(4, 2), (3, 5)])
    want = torch.zeros(2, 4, 5, dtype=torch.bool)
    want[0, :, 2:] = True
    want[1, 3:] = True
    assert torch.equal(padding_masks(images), want)


def test_cell_centers_are_fractions_of_the_image():
    ratios = torch.stack([valid_ratio(m, torch.float32) for m in masks()], 1)
    want = [[[1, 1], [1, 1]], [[2 / 6, 3 / 4], [1 / 3, 1]]]
    torch.testing.assert_close(ratios, torch.tensor(want))
    torch.testing.assert_close(cell_centers(SHAPES, ratios), slow_centers())


def test_valid_ratios_and_proposals_have_double_precision():
    """Fractions such as 1/3, and sides such as 0.05, have the full precision of the model's dtype."""
    ratios = torch.stack([valid_ratio(m, torch.float64) for m in masks()], 1)
    want = torch.tensor([[[1, 1], [1, 1]], [[2 / 6, 3 / 4], [1 / 3, 1]]], dtype=torch.float64)
    torch.testing.assert_close(ratios, want, rtol=1e-15, atol=0)
    transformer = small_dino().double().transformer
    mask = torch.cat([m.flatten(1) for m in masks()], 1)
    memory = torch.rand(2, 30, DIM, dtype=torch.float64)
    boxes = transformer.gen_encoder_output_proposals(memory, mask, torch.tensor(SHAPES))[1].sigmoid()
    sides = torch.full((2, 30, 2), 0.05, dtype=torch.float64)
    sides[:, 24:] = 0.1
    want = torch.where(boxes[..., 2:] == 1, 1.0, sides)
    torch.testing.assert_close(boxes[..., 2:], want, rtol=1e-14, atol=0)


def test_flatten_levels_keeps_cells_in_order():
    feats = [torch.rand(2, 3, *shape) for shape in SHAPES]
    pos = [torch.rand(2, 3, *shape) for shape in SHAPES]
    embeds = torch.rand(2, 3)
    levels = flatten_levels(feats, masks(), pos, embeds)
    assert levels.spatial_shapes.tolist() == [[4, 6], [2, 3]] and levels.level_start_index.tolist() == [0, 24]
    assert levels.shapes == SHAPES and levels.cells.shape == (2, 30, 3)
    assert torch.equal(levels.cells[1, 24 + 4], feats[1][1, :, 1, 1])
    torch.testing.assert_close(levels.pos[1, 24 + 4], pos[1][1, :, 1, 1] + embeds[1])
    assert torch.equal(levels.mask[:, :24], masks()[0].flatten(1))


def test_proposals_are_centered_on_cells():
    """Proposals have the side 0.05 * 2**level, and are infinite in the padding and near the border."""
    transformer = small_dino().transformer
    memory = torch.rand(2, 30, DIM)
    mask = torch.cat([m.flatten(1) for m in masks()], 1)
    cells, anchors = transformer.gen_encoder_output_proposals(memory, mask, torch.tensor(SHAPES))
    empty = transformer.enc_output_norm(transformer.enc_output(torch.zeros(DIM)))
    centers = slow_centers()
    for image in range(2):
        for cell in range(30):
            x, y = centers[image, cell].tolist()
            side = 0.05 if cell < 24 else 0.1
            if mask[image, cell] or not (0.01 < x < 0.99 and 0.01 < y < 0.99):
                assert anchors[image, cell].isinf().all()
                torch.testing.assert_close(cells[image, cell], empty)
                continue
            want = [math.log(v / (1 - v)) for v in (x, y, side, side)]
            assert anchors[image, cell].tolist() == pytest.approx(want, abs=1e-5)
            own = transformer.enc_output_norm(transformer.enc_output(memory[image, cell]))
            torch.testing.assert_close(cells[image, cell], own)


def test_reference_points_are_fractions_of_the_padded_level():
    transformer = small_dino().transformer
    ratios = torch.stack([transformer.get_valid_ratio(m) for m in masks()], 1)
    found = transformer.get_reference_points(torch.tensor(SHAPES), ratios)
    assert found.shape == (2, 30, 2, 2)
    want = slow_centers()[1, 7] * torch.tensor([[2 / 6, 3 / 4], [1 / 3, 1]])
    torch.testing.assert_close(found[1, 7], want)


def test_refine_boxes_adds_deltas_to_logits():
    deltas = torch.randn(2, 3, 4)
    boxes = torch.rand(2, 3, 4) * 0.9 + 0.05
    logits = torch.log(boxes / (1 - boxes))
    torch.testing.assert_close(refine_boxes(deltas, boxes), torch.sigmoid(logits + deltas))
    from_points = refine_boxes(deltas, boxes[..., :2])
    torch.testing.assert_close(from_points[..., :2], torch.sigmoid(logits + deltas)[..., :2])
    torch.testing.assert_close(from_points[..., 2:], deltas[..., 2:].sigmoid())


@pytest.mark.parametrize(
    "make, looks_twice",
    [
        (small_dino, True),
        (lambda: small_dino(look_forward_twice=False), False),
        (lambda: small_deformable_detr(with_box_refine=True), False),
    ],
)
def test_look_forward_twice_lets_gradients_through(make, looks_twice):
    """Gradients of the next layer's boxes reach a layer's box head only with look forward twice."""
    model = make()
    outputs = model.predict(model.preprocess_image(batch()), None)
    outputs["pred_boxes"].sum().backward()
    grad = model.bbox_embed[0].layers[-1].weight.grad
    assert (grad is not None and bool(grad.any())) == looks_twice


@pytest.mark.parametrize("name", ["deformable_detr_refine", "dino"])
def test_decoder_equals_its_layers_in_sequence(name):
    """Each layer must attend around the boxes that the layer before it refined."""
    model = MODELS[name]()
    with torch.no_grad():
        for head in model.bbox_embed:
            torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    decoder = model.transformer.decoder
    torch.manual_seed(1)
    query, memory, given = torch.randn(2, 5, DIM), torch.randn(2, 30, DIM), torch.randn(2, 5, DIM)
    references = torch.rand(2, 5, 4 if name == "dino" else 2) * 0.8 + 0.1
    ratios = torch.tensor([[[1.0, 1.0]] * 4, [[0.5, 0.75], [0.5, 1.0], [1.0, 0.5], [1.0, 1.0]]])
    shapes = torch.tensor([(4, 5), (2, 3), (1, 3), (1, 1)])
    kwargs = dict(spatial_shapes=shapes, level_start_index=torch.tensor([0, 20, 26, 29]))
    states, boxes = decoder(
        query, memory, memory, query_pos=given, reference_points=references, valid_ratios=ratios, **kwargs
    )
    for i, layer in enumerate(decoder.layers):
        twice = torch.cat([ratios, ratios], 2) if references.shape[2] == 4 else ratios
        on_levels = torch.stack([references * twice[:, None, level] for level in range(4)], 2)
        pos = given
        if name == "dino":
            pos = decoder.ref_point_head(get_sine_pos_embed(on_levels[:, :, 0], DIM // 2))
        query = layer(query, memory, memory, query_pos=pos, reference_points=on_levels, **kwargs)
        delta = model.bbox_embed[i](query)
        logits = torch.zeros(2, 5, 4)
        logits[..., : references.shape[2]] = inverse_sigmoid(references)
        references = (delta + logits).sigmoid()
        torch.testing.assert_close(boxes[i], references)
        torch.testing.assert_close(states[i], decoder.norm(query) if name == "dino" else query)


def test_layers_share_one_box_head_without_refinement():
    model = small_deformable_detr()
    assert len({id(head) for head in model.bbox_embed}) == 1
    outputs = model.predict(model.preprocess_image(batch()), None)
    assert len(outputs["aux_outputs"]) == 1
    assert model.transformer.decoder.bbox_embed is None


def test_activation_checkpointing_keeps_gradients():
    grads = []
    for use_checkpoint in (False, True):
        model = small_dino(dn_number=0)
        model.transformer.decoder.use_checkpoint = model.transformer.encoder.use_checkpoint = use_checkpoint
        sum(model(batch()).values()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=lambda m, n=name: f"{n}: {m}")
