"""Reference implementations of DETR, Deformable DETR and DINO: the formulas of their papers as functions.

`w` is a state dict in float64. Shape legend: N images, Q queries, C channels, S cells over all levels.
"""

import math

import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

NUM_HEADS, NUM_POINTS = 4, 4


def linear(w, name, x):
    return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]


def norm(w, name, x):
    centered = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt(centered.square().mean(-1, keepdim=True) + 1e-5)
    return centered / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def mlp(w, name, x, depth=3):
    for i in range(depth):
        x = linear(w, f"{name}.layers.{i}", x if i == 0 else x.clamp(min=0))
    return x


def add_ffn(w, name, x):
    return x + linear(w, f"{name}.layers.1", linear(w, f"{name}.layers.0.0", x).clamp(min=0))


def logit(x, eps=1e-3):
    """Return the logit of values clamped at `eps`: detrex uses 1e-3, the papers' own code 1e-5."""
    return (x.clamp(eps, 1) / (1 - x).clamp(eps, 1)).log()


def sines(x, count):
    """Embed (...) as (..., count): sines at even indices, cosines at odd ones."""
    angles = [2 * math.pi * x / 10000 ** (2 * (i // 2) / count) for i in range(count)]
    return torch.stack([a.cos() if i % 2 else a.sin() for i, a in enumerate(angles)], -1)


def embed_cells(mask, dim, offset):
    """Embed the rows and columns of (N, H, W) padding masks, as fractions of the image: (N, H * W, dim)."""
    y, x = (~mask).double().cumsum(1), (~mask).double().cumsum(2)
    y, x = (y + offset) / (y[:, -1:] + 1e-6), (x + offset) / (x[:, :, -1:] + 1e-6)
    return torch.cat([sines(y, dim // 2), sines(x, dim // 2)], -1).flatten(1, 2)


def attend(w, name, query, key, value, hidden):
    """Apply multi-head attention; `hidden` masks keys and broadcasts with (N, heads, Q, keys)."""
    parts = zip(w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3))
    q, k, v = ((x @ a.t() + b).unflatten(2, (NUM_HEADS, -1)) for x, (a, b) in zip((query, key, value), parts))
    scores = torch.einsum("nqhc,nkhc->nhqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return linear(w, f"{name}.out_proj", torch.einsum("nhqk,nkhc->nqhc", weights, v).flatten(2))


def sample(cells, height, width, x, y):
    """Interpolate (N, H * W, heads, c) cells bilinearly at (N, Q, heads, points) fractions; zero outside."""
    cells, total = cells.transpose(1, 2), 0
    x, y = x * width - 0.5, y * height - 0.5
    for column in (x.floor(), x.floor() + 1):
        for row in (y.floor(), y.floor() + 1):
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            index = index.transpose(1, 2).flatten(2)[..., None].expand(-1, -1, -1, cells.shape[-1])
            found = cells.gather(2, index).unflatten(2, (x.shape[1], -1)).transpose(1, 2)
            total = total + found * (weight * inside)[..., None]
    return total


def attend_to_points(w, name, query, cells, hidden, references, shapes):
    """Apply multi-scale deformable attention; `references` is (N, Q, L, 2 or 4)."""
    sizes = (NUM_HEADS, len(shapes), NUM_POINTS)
    value = linear(w, f"{name}.value_proj", cells).masked_fill(hidden[..., None], 0)
    value = value.unflatten(2, (NUM_HEADS, -1))
    offsets = linear(w, f"{name}.sampling_offsets", query).unflatten(2, (*sizes, 2))
    weights = linear(w, f"{name}.attention_weights", query).unflatten(2, (NUM_HEADS, -1)).softmax(-1)
    weights = weights.unflatten(3, sizes[1:])
    total, start = 0, 0
    for level, (height, width) in enumerate(shapes):
        center = references[:, :, None, None, level]
        if center.shape[-1] == 2:
            step = offsets[:, :, :, level] / torch.tensor([width, height])
        else:
            step = offsets[:, :, :, level] / NUM_POINTS * center[..., 2:] / 2
        x, y = (center[..., :2] + step).unbind(-1)
        found = sample(value[:, start : start + height * width], height, width, x, y)
        total = total + (found * weights[:, :, :, level, :, None]).sum(3)
        start += height * width
    return linear(w, f"{name}.output_proj", total.flatten(2))


def slow_detr(w, x, mask, num_layers):
    """Return the logits and boxes of every layer, from the (N, C_in, H, W) feature map of the backbone."""
    dim = w["input_proj.weight"].shape[0]
    cells = x.flatten(2).transpose(1, 2) @ w["input_proj.weight"].flatten(1).t() + w["input_proj.bias"]
    pos, hidden = embed_cells(mask, dim, 0.0), mask.flatten(1)[:, None, None]
    for i in range(num_layers):
        name = f"transformer.encoder.layers.{i}"
        key = cells + pos
        seen = attend(w, f"{name}.attentions.0.attn", key, key, cells, hidden)
        cells = norm(w, f"{name}.norms.0", cells + seen)
        cells = norm(w, f"{name}.norms.1", add_ffn(w, f"{name}.ffns.0", cells))
    query_pos = w["query_embed.weight"].expand(len(x), -1, -1)
    query, layers = torch.zeros_like(query_pos), []
    nothing = torch.tensor(False)
    for i in range(num_layers):
        name = f"transformer.decoder.layers.{i}"
        key = query + query_pos
        seen = attend(w, f"{name}.attentions.0.attn", key, key, query, nothing)
        query = norm(w, f"{name}.norms.0", query + seen)
        seen = attend(w, f"{name}.attentions.1.attn", query + query_pos, cells + pos, cells, hidden)
        query = norm(w, f"{name}.norms.1", query + seen)
        query = norm(w, f"{name}.norms.2", add_ffn(w, f"{name}.ffns.0", query))
        state = norm(w, "transformer.decoder.post_norm_layer", query)
        layers.append((linear(w, "class_embed", state), mlp(w, "bbox_embed", state).sigmoid()))
    return layers


class SlowLevels:
    """The encoded cells of all levels, and their proposals."""

    def __init__(self, w, maps, masks, num_layers):
        dim = maps[0].shape[1]
        self.w, self.shapes, self.num_layers = w, [x.shape[2:] for x in maps], num_layers
        self.hidden = torch.cat([m.flatten(1) for m in masks], 1)
        pos = [embed_cells(m, dim, -0.5) + e for m, e in zip(masks, w["transformer.level_embeds"])]
        pos = torch.cat(pos, 1)
        filled = [torch.stack([(~m[:, 0]).sum(1), (~m[:, :, 0]).sum(1)], 1).double() for m in masks]
        self.ratios = torch.stack(
            [f / torch.tensor([x.shape[3], x.shape[2]]) for f, x in zip(filled, maps)], 1
        )
        centers = []
        for (height, width), f in zip(self.shapes, filled):
            y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
            centers.append((torch.stack([x, y], 1) + 0.5) / f[:, None])
        self.centers = torch.cat(centers, 1)
        cells = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        references = self.centers[:, :, None] * self.ratios[:, None]
        for i in range(num_layers):
            name = f"transformer.encoder.layers.{i}"
            seen = self.look(f"{name}.attentions.0", cells + pos, references, cells)
            cells = norm(w, f"{name}.norms.0", cells + seen)
            cells = norm(w, f"{name}.norms.1", add_ffn(w, f"{name}.ffns.0", cells))
        self.cells = cells

    def look(self, name, query, references, cells):
        return attend_to_points(self.w, name, query, cells, self.hidden, references, self.shapes)

    def propose(self):
        """Return the inputs of the heads, class logits and box logits of every cell."""
        w, head = self.w, self.num_layers
        sides = [0.05 * 2**i for i, shape in enumerate(self.shapes) for _ in range(math.prod(shape))]
        sides = torch.tensor(sides, dtype=torch.float64)[:, None].expand(len(self.centers), -1, 2)
        boxes = torch.cat([self.centers, sides], 2)
        usable = ((boxes > 0.01) & (boxes < 0.99)).all(2) & ~self.hidden
        anchors = torch.where(usable[..., None], (boxes / (1 - boxes).clamp(min=1e-9)).log(), math.inf)
        cells = linear(w, "transformer.enc_output", self.cells * usable[..., None])
        cells = norm(w, "transformer.enc_output_norm", cells)
        return cells, linear(w, f"class_embed.{head}", cells), mlp(w, f"bbox_embed.{head}", cells) + anchors

    def decoder_layer(self, i, query, pos, references, hidden):
        w, name = self.w, f"transformer.decoder.layers.{i}"
        ratios = self.ratios.repeat(1, 1, references.shape[-1] // 2)
        key = query + pos
        seen = attend(w, f"{name}.attentions.0.attn", key, key, query, hidden)
        query = norm(w, f"{name}.norms.0", query + seen)
        on_levels = references[:, :, None] * ratios[:, None]
        seen = self.look(f"{name}.attentions.1", query + pos, on_levels, self.cells)
        query = norm(w, f"{name}.norms.1", query + seen)
        return norm(w, f"{name}.norms.2", add_ffn(w, f"{name}.ffns.0", query))


def moved(references, delta):
    """Add `delta` to points or boxes in logit space; for points, `delta` alone gives the size."""
    size = logit(references[..., 2:]) if references.shape[-1] == 4 else 0
    return torch.cat([delta[..., :2] + logit(references[..., :2]), delta[..., 2:] + size], -1).sigmoid()


def rows(x, index):
    return torch.stack([a[i] for a, i in zip(x, index)])


def slow_deformable_detr(w, maps, masks, num_layers, num_queries, refines, two_stage):
    """Return the logits and boxes of every decoder layer, and of the encoder if `two_stage`."""
    levels, dim = SlowLevels(w, maps, masks, num_layers), maps[0].shape[1]
    encoder_outputs = None
    if two_stage:
        _, logits, boxes = levels.propose()
        encoder_outputs = logits, boxes.sigmoid()
        best = logits[..., 0].argsort(1, descending=True)[:, :num_queries]
        references = rows(boxes, best).sigmoid().detach()
        assert references.max() < 1, "the best cells must have proposals"
        embedded = torch.cat([sines(references[..., i], dim // 2) for i in range(4)], -1)
        mixed = norm(w, "transformer.pos_trans_norm", linear(w, "transformer.pos_trans", embedded))
        pos, query = mixed[..., :dim], mixed[..., dim:]
    else:
        both = w["query_embedding.weight"].expand(len(maps[0]), -1, -1)
        pos, query = both[..., :dim], both[..., dim:]
        references = linear(w, "transformer.reference_points", pos).sigmoid()
    layers = []
    for i in range(num_layers):
        head = i if refines else 0
        query = levels.decoder_layer(i, query, pos, references, torch.tensor(False))
        boxes = moved(references, mlp(w, f"bbox_embed.{head}", query))
        layers.append((linear(w, f"class_embed.{head}", query), boxes))
        references = boxes.detach() if refines else references
    return layers, encoder_outputs


def slow_dino(w, maps, masks, num_layers, num_queries, denoising, looks_twice):
    """Return the logits and boxes of every decoder layer and of the encoder.

    The contents of the queries are learned if there are weights for them; otherwise they are the features of
    the best cells.

    `denoising` holds the contents (N, D, C), boxes (N, D, 4) and attention mask (D, D) of the denoising
    queries, which come first.
    """
    levels, dim = SlowLevels(w, maps, masks, num_layers), maps[0].shape[1]
    cells, logits, boxes = levels.propose()
    best = logits.max(2).values.argsort(1, descending=True)[:, :num_queries]
    enc_boxes = rows(boxes, best).sigmoid()
    assert enc_boxes.max() < 1, "the best cells must have proposals"
    contents, dn_boxes, apart = denoising
    seen = rows(cells, best)
    learned = w.get("transformer.tgt_embed.weight")
    own = seen.detach() if learned is None else learned.expand(len(cells), -1, -1)
    query = torch.cat([contents, own], 1)
    references, count = torch.cat([dn_boxes, enc_boxes.detach()], 1), len(apart)
    hidden = torch.zeros(count + num_queries, count + num_queries, dtype=torch.bool)
    hidden[:count, :count], hidden[count:, :count] = apart, True
    layers, seen_by_head = [], references
    for i in range(num_layers):
        on_first = references * levels.ratios[:, 0].repeat(1, 2)[:, None]
        embedded = torch.cat([sines(on_first[..., c], dim // 2) for c in (1, 0, 2, 3)], -1)
        pos = mlp(w, "transformer.decoder.ref_point_head", embedded, 2)
        query = levels.decoder_layer(i, query, pos, references, hidden)
        state = norm(w, "transformer.decoder.norm", query)
        predicted = moved(seen_by_head, mlp(w, f"bbox_embed.{i}", state))
        layers.append((linear(w, f"class_embed.{i}", state), predicted))
        refined = moved(references, mlp(w, f"bbox_embed.{i}", query))
        references = refined.detach()
        seen_by_head = refined if looks_twice else references
    return layers, (linear(w, f"class_embed.{num_layers}", seen), enc_boxes)


def overlap(boxes, others):
    return generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (boxes, others)))


def focal(logits, alpha=0.25, gamma=2):
    """Return the focal losses of each class as a positive and as a negative."""
    p = logits.sigmoid()
    return -alpha * (1 - p) ** gamma * p.log(), -(1 - alpha) * p**gamma * (1 - p).log()


def slow_matches(logits, boxes, targets, weights, is_softmax):
    """Return the queries and their objects for each image, with minimal cost."""
    matches = []
    for own_logits, own_boxes, target in zip(logits.detach(), boxes.detach(), targets):
        positive, negative = focal(own_logits)
        by_class = -own_logits.softmax(-1) if is_softmax else positive - negative
        distance = (own_boxes[:, None] - target["boxes"]).abs().sum(-1)
        cost = weights[0] * by_class[:, target["labels"]] + weights[1] * distance
        cost = cost - weights[2] * overlap(own_boxes, target["boxes"])
        matches.append([torch.as_tensor(x) for x in linear_sum_assignment(cost.numpy())])
    return matches


def slow_losses(logits, boxes, targets, matches, num_boxes, eos_coef=None):
    """Return the differentiable losses of one layer; `eos_coef` selects softmax with the background last."""
    by_class, total, distance, apart = 0, 0, 0, 0
    for own_logits, own_boxes, target, (queries, objects) in zip(logits, boxes, targets, matches):
        labels, gt_boxes = target["labels"][objects], target["boxes"][objects]
        if eos_coef is None:
            positive, negative = focal(own_logits)
            by_class = by_class + negative.sum() + (positive - negative)[queries, labels].sum()
        else:
            cost = -own_logits.log_softmax(-1)
            background = torch.ones(len(cost), dtype=torch.bool).index_fill(0, queries, False)
            by_class = by_class + cost[queries, labels].sum() + eos_coef * cost[background, -1].sum()
            total += len(queries) + eos_coef * int(background.sum())
        distance = distance + (own_boxes[queries] - gt_boxes).abs().sum()
        apart = apart + (1 - overlap(own_boxes[queries], gt_boxes).diagonal()).sum()
    by_class = by_class / (num_boxes if eos_coef is None else total)
    return {"loss_class": by_class, "loss_bbox": distance / num_boxes, "loss_giou": apart / num_boxes}
