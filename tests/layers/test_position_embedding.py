"""Position embeddings against the formulas of the papers, written out with loops."""

import math

import pytest
import torch

from detlib.layers import PositionEmbeddingLearned, PositionEmbeddingSine, get_sine_pos_embed


def slow_sine(value, num_feats, temperature):
    """Return the features of one number."""
    out = []
    for i in range(num_feats):
        angle = value / temperature ** (2 * (i // 2) / num_feats)
        out.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    return out


@pytest.mark.parametrize("normalize, offset", [(True, -0.5), (True, 0.0), (False, 0.0)])
def test_sine_embedding_of_cells_matches_the_formula(normalize, offset):
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1, 3:] = True
    mask[1, :, 2:] = True
    module = PositionEmbeddingSine(
        num_pos_feats=6, temperature=20, scale=3.0, normalize=normalize, offset=offset
    )
    found = module(mask)
    assert found.shape == (2, 12, 4, 5) and found.dtype == torch.float32
    for image, (height, width) in enumerate([(4, 5), (3, 2)]):
        for y in range(4):
            for x in range(5):
                row, column = min(y + 1, height), min(x + 1, width)  # the count stops at the padding
                if normalize:
                    row = (row + offset) / (height + 1e-6) * 3.0
                    column = (column + offset) / (width + 1e-6) * 3.0
                    if image == 1 and (y >= height or x >= width):
                        continue  # the row or column is empty: 0 is divided by 0
                elif image == 1 and (y >= height or x >= width):
                    continue
                want = slow_sine(row, 6, 20) + slow_sine(column, 6, 20)
                torch.testing.assert_close(
                    found[image, :, y, x], torch.tensor(want), rtol=1e-5, atol=1e-5, msg=f"{image, y, x}"
                )


@pytest.mark.parametrize("exchange_xy", [True, False])
def test_sine_embedding_of_boxes_matches_the_formula(exchange_xy):
    boxes = torch.rand(2, 3, 4, dtype=torch.float64)
    found = get_sine_pos_embed(boxes, num_pos_feats=8, temperature=100, exchange_xy=exchange_xy)
    assert found.shape == (2, 3, 32) and found.dtype == torch.float64
    x, y, w, h = boxes[1, 2].tolist()
    order = (y, x, w, h) if exchange_xy else (x, y, w, h)
    want = [f for v in order for f in slow_sine(v * 2 * math.pi, 8, 100)]
    torch.testing.assert_close(found[1, 2], torch.tensor(want, dtype=torch.float64))


def test_sine_embedding_of_points_and_scalars():
    points = torch.rand(5, 2)
    assert get_sine_pos_embed(points, 16).shape == (5, 32)
    torch.testing.assert_close(get_sine_pos_embed(points, 16)[:, 16:], get_sine_pos_embed(points[:, :1], 16))


def test_learned_embedding_concatenates_columns_and_rows():
    module = PositionEmbeddingLearned(num_pos_feats=3, row_num_embed=4, col_num_embed=5)
    assert set(module.state_dict()) == {"row_embed.weight", "col_embed.weight"}
    found = module(torch.zeros(2, 4, 5, dtype=torch.bool))
    assert found.shape == (2, 6, 4, 5)
    want = torch.cat([module.col_embed.weight[4], module.row_embed.weight[2]])
    assert torch.equal(found[1, :, 2, 4], want)
    assert 0 <= module.row_embed.weight.min() and module.row_embed.weight.max() < 1


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_pos_feats must be even.*got 5"):
        PositionEmbeddingSine(num_pos_feats=5)
    with pytest.raises(ValueError, match="num_pos_feats must be even.*got 7"):
        get_sine_pos_embed(torch.rand(2, 2), 7)
    with pytest.raises(ValueError, match=r"mask must be \(N, H, W\) bool, got \(2, 3\)"):
        PositionEmbeddingSine()(torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be at least 3 and 9.*got 4 and 5"):
        PositionEmbeddingLearned(3, 4, 5)(torch.zeros(1, 3, 9))
