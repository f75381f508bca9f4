"""Comparison of a model with a stored case: parameter names, features, outputs, losses and gradients.

A case is a pair of files: NAME.json (config, overrides, inputs, single numbers) and NAME.npz (arrays). Its
training losses are those of a model that samples every anchor and proposal, so they do not depend on random
numbers.
"""

import json
import pathlib
from dataclasses import dataclass

import numpy as np
import torch

from detlib.config import CfgNode, LazyConfig, get_cfg
from detlib.modeling import build_model
from detlib.structures import Boxes, Instances, Keypoints, PolygonMasks
from detlib.utils.events import EventStorage
from tests.conformance.synthetic import objects, semantic_map, synthetic_image, weight

# Above the float32 rounding differences between kernels and thread counts, and below the effect of a changed
# sampling ratio or threshold.
RTOL = 2e-3


@dataclass
class Case:
    """A stored case."""

    facts: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: pathlib.Path) -> "Case":
        with np.load(path.with_suffix(".npz")) as arrays:
            return cls(json.loads(path.read_text()), dict(arrays))

    def outputs(self, index: int) -> dict[str, dict[str, np.ndarray]]:
        """Return the expected outputs of an image: arrays by name, by field ("instances", "proposals")."""
        fields: dict[str, dict[str, np.ndarray]] = {}
        for key, value in self.arrays.items():
            if key.startswith(f"out{index}/"):
                _, field, name = key.split("/", 2)
                fields.setdefault(field, {})[name] = value
        return fields


def build_case_model(case: Case, config_dir: pathlib.Path) -> tuple[torch.nn.Module, CfgNode | None]:
    """Build the model of a case. Return it with its config, which is None for a lazy config."""
    path = str(config_dir / case.facts["config"])
    if path.endswith(".py"):
        cfg = LazyConfig.apply_overrides(LazyConfig.load(path), case.facts["overrides"])
        return build_model(cfg.model), None
    cfg = get_cfg()
    cfg.merge_from_file(path)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *case.facts["overrides"]])
    return build_model(cfg), cfg


def moved(value, device: str):
    """Copy nested dicts, lists and tuples, with their tensors and structures moved to `device`."""
    if isinstance(value, dict):
        return {key: moved(x, device) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(x, device) for x in value)
    return value.to(device) if hasattr(value, "to") else value


def run_case(
    case: Case, config_dir: pathlib.Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[str]:
    """Build and run the model of a case, and return a list of the differences."""
    model, cfg = build_case_model(case, config_dir)
    model.eval()
    differences = compare_state(model, case)
    if differences:
        return differences
    fill_weights(model, case)
    model.to(device, dtype)
    items = make_inputs(case)
    features: dict[str, torch.Tensor] = {}
    hook = model.backbone.register_forward_hook(lambda module, args, output: features.update(output))
    with torch.no_grad():
        outputs = model(items)
    hook.remove()
    differences += compare_features(moved(features, "cpu"), case)
    for i, output in enumerate(moved(outputs, "cpu")):
        differences += compare_outputs(output, case.outputs(i), f"image {i}", "top" in case.facts)

    if "losses" not in case.facts:
        return differences
    add_ground_truth(
        items,
        case,
        with_masks=cfg is None or cfg.MODEL.MASK_ON,
        with_keypoints=cfg.MODEL.KEYPOINT_ON if cfg else "keypoint" in case.facts["config"],
    )
    if hasattr(model, "sem_seg_head"):
        add_semantic_ground_truth(items, case, model.sem_seg_head.num_classes)
    with EventStorage() as storage:
        losses = model.train()(items)
    sum(losses.values()).backward()
    counts = {name: value for name, (value, _) in storage.latest().items()}
    return (
        differences
        + compare_losses(losses, case)
        + compare_counts(counts, case)
        + compare_gradients(model, case)
    )


def _counted(named_shapes, alias: dict[str, str]) -> dict[str, tuple[int, ...]]:
    return {
        alias.get(name, name): tuple(shape)
        for name, shape in named_shapes
        if not name.endswith("num_batches_tracked")
    }


def compare_state(model: torch.nn.Module, case: Case) -> list[str]:
    """Compare names and shapes of parameters and buffers, except for optional ones."""
    alias, optional = case.facts.get("alias", {}), case.facts.get("optional", ())
    have = _counted(((k, v.shape) for k, v in model.state_dict().items() if k not in optional), alias)
    expected = _counted(case.facts["state"], alias)
    return (
        [f"state: {name} is missing" for name in sorted(expected.keys() - have.keys())]
        + [f"state: {name} is unexpected" for name in sorted(have.keys() - expected.keys())]
        + [
            f"state: {name} has shape {have[name]}, expected {expected[name]}"
            for name in sorted(have.keys() & expected.keys())
            if have[name] != expected[name]
        ]
    )


def fill_weights(model: torch.nn.Module, case: Case) -> None:
    """Set every parameter and buffer to the value that its name determines."""
    alias = case.facts.get("alias", {})
    values = {
        name: torch.from_numpy(weight(name, tuple(v.shape), case.facts["scale"], alias))
        for name, v in model.state_dict().items()
    }
    model.load_state_dict(values)


def make_inputs(case: Case) -> list[dict]:
    """Return the input images of a case, with proposals if it has them."""
    items = []
    for i, facts in enumerate(case.facts["inputs"]):
        height, width = facts["image"]
        image = torch.from_numpy(synthetic_image(height, width, facts["image_seed"]))
        item = {"image": image, "height": facts["height"], "width": facts["width"]}
        if "proposals" in facts:
            boxes = torch.from_numpy(case.arrays[f"proposals/{i}/boxes"])
            item["proposals"] = Instances(
                (height, width),
                proposal_boxes=Boxes(boxes),
                objectness_logits=torch.linspace(5, -5, len(boxes)),
            )
        items.append(item)
    return items


def add_ground_truth(items: list[dict], case: Case, with_masks: bool, with_keypoints: bool = False) -> None:
    """Add ground truth instances to the inputs."""
    for item, facts in zip(items, case.facts["inputs"]):
        height, width = facts["image"]
        found = objects(height, width, facts["image_seed"], case.facts["num_classes"])
        instances = Instances((height, width), gt_boxes=Boxes(torch.tensor([x["box"] for x in found])))
        instances.gt_classes = torch.tensor([x["class"] for x in found])
        if with_masks:
            instances.gt_masks = PolygonMasks([[np.array(x["polygon"])] for x in found])
        if with_keypoints:
            instances.gt_keypoints = Keypoints(torch.tensor([x["keypoints"] for x in found]))
        item["instances"] = instances


def add_semantic_ground_truth(items: list[dict], case: Case, num_classes: int) -> None:
    """Add semantic label maps to the inputs."""
    for item, facts in zip(items, case.facts["inputs"]):
        labels = semantic_map(*facts["image"], facts["image_seed"], num_classes)
        item["sem_seg"] = torch.from_numpy(labels)


def compare_features(features: dict[str, torch.Tensor], case: Case) -> list[str]:
    """Compare a grid of each feature map. Errors are relative to its standard deviation."""
    found = []
    for name in case.facts["features"]:
        if name not in features:
            found.append(f"features: {name} is missing")
            continue
        x = features[name]
        steps = [max(1, side // 8) for side in x.shape[2:]]
        have = x[:, :8, :: steps[0], :: steps[1]].numpy()
        expected = case.arrays[f"feature/{name}"]
        if have.shape != expected.shape:
            found.append(f"features: {name} has a grid of {have.shape}, expected {expected.shape}")
            continue
        error = np.abs(have - expected).max() / (expected.std() + 0.01 * np.abs(expected).max())
        if not error < RTOL:
            found.append(f"features: {name} differs by {error:.2g} standard deviations")
    return found


def compare_outputs(
    output: dict, kinds: dict[str, dict[str, np.ndarray]], where: str, best_only: bool = False
) -> list[str]:
    """Compare the outputs of an image.

    Of detections and proposals, 3 % may differ, since near ties may change their order. With `best_only`, the
    case has only the top-scoring detections, and the model may have more.
    """
    found = [f"{where}: no {kind!r}" for kind in kinds.keys() - output.keys()]
    for kind in kinds.keys() & output.keys():
        have, expected = output[kind], kinds[kind]
        if kind in ("sem_seg", "panoptic_seg"):
            compare = compare_sem_seg if kind == "sem_seg" else compare_panoptic
            found += [f"{where}: {text}" for text in compare(have, expected)]
            continue
        count = int(expected["count"])
        spare = max(1, int(0.03 * count))
        if abs(len(have) - count) > spare and not (best_only and len(have) > count):
            found.append(f"{where}: {len(have)} {kind}, expected {count}")
            continue
        pairs = _pair_up(have, expected)
        if len(pairs) < count - spare:
            found.append(f"{where}: only {len(pairs)} of {count} {kind} match")
        elif "pred_masks_bits" in expected and (bad := _count_other_masks(have, expected, pairs)) > spare:
            found.append(f"{where}: {bad} of {len(pairs)} masks differ")
        elif "pred_keypoints" in expected and (bad := _count_other_keypoints(have, expected, pairs)) > spare:
            found.append(f"{where}: the keypoints of {bad} of {len(pairs)} objects differ")
    return found


def compare_sem_seg(logits: torch.Tensor, expected: dict[str, np.ndarray]) -> list[str]:
    """Compare a grid of the logits, relative to their standard deviation, and the class of each pixel."""
    sample = expected["sample"]
    error = np.abs(logits[:, ::16, ::16].numpy() - sample).max() / (
        sample.std() + 0.01 * np.abs(sample).max()
    )
    agreement = (logits.argmax(dim=0).numpy() == expected["argmax"]).mean()
    if error < 2 * RTOL and agreement > 0.998:
        return []
    return [f"sem_seg differs by {error:.2g} standard deviations, {agreement:.2%} of the pixels agree"]


def compare_panoptic(have: tuple[torch.Tensor, list[dict]], expected: dict[str, np.ndarray]) -> list[str]:
    """Compare panoptic segmentations.

    Segments with the largest overlap must have the same category, and 99 % of the pixels must agree.
    """
    ids, expected_ids = have[0].numpy(), expected["map"]
    categories = {x["id"]: (x["isthing"], x["category_id"]) for x in have[1]}
    expected_segments = json.loads(str(expected["segments"]))
    if abs(len(categories) - len(expected_segments)) > 1:
        return [f"{len(categories)} segments, expected {len(expected_segments)}"]
    agree = int(((ids == 0) & (expected_ids == 0)).sum())
    for segment in expected_segments:
        counts = np.bincount(ids[expected_ids == segment["id"]])
        if categories.get(int(counts.argmax())) == (segment["isthing"], segment["category_id"]):
            agree += int(counts.max())
    return [] if agree > 0.99 * ids.size else [f"panoptic_seg: {agree / ids.size:.2%} of the pixels agree"]


def _pair_up(have: Instances, expected: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """Return pairs of indices in `have` and `expected` with equal class and nearly equal box and score."""
    is_detection = "pred_boxes" in expected
    boxes = getattr(have, "pred_boxes" if is_detection else "proposal_boxes").tensor.numpy()
    scores = getattr(have, "scores" if is_detection else "objectness_logits").numpy()
    expected_boxes = expected["pred_boxes" if is_detection else "proposal_boxes"]
    expected_scores = expected["scores" if is_detection else "objectness_logits"]
    free, pairs = np.ones(len(have), bool), []
    for j, (box, score) in enumerate(zip(expected_boxes, expected_scores)):
        side = max(1.0, box[2] - box[0], box[3] - box[1])
        distance = np.maximum(
            np.abs(boxes - box).max(axis=1, initial=0) / (0.3 + 10 * RTOL * side),
            np.abs(scores - score) / (5 * RTOL * max(1.0, abs(float(score)))),
        )
        valid = free & (have.pred_classes.numpy() == expected["pred_classes"][j]) if is_detection else free
        distance[~valid] = np.inf
        if len(distance) and distance.min() < 1:
            i = int(distance.argmin())
            free[i] = False
            pairs.append((i, j))
    return pairs


def _count_other_masks(have: Instances, expected: dict[str, np.ndarray], pairs: list[tuple[int, int]]) -> int:
    """Return the number of masks that differ by more than 5 % of their union plus 4 pixels."""
    shape = tuple(expected["pred_masks_shape"])
    masks = np.unpackbits(expected["pred_masks_bits"], count=int(np.prod(shape))).reshape(shape).astype(bool)
    ours = have.pred_masks.numpy().astype(bool)
    return sum((ours[i] ^ masks[j]).sum() > 0.05 * (ours[i] | masks[j]).sum() + 4 for i, j in pairs)


def _count_other_keypoints(
    have: Instances, expected: dict[str, np.ndarray], pairs: list[tuple[int, int]]
) -> int:
    """Count objects with a keypoint more than a pixel away, or a score error above 5 % of the deviation."""
    bad = 0
    for i, j in pairs:
        ours, theirs = have.pred_keypoints[i].numpy(), expected["pred_keypoints"][j]
        score_error = np.abs(ours[:, 2] - theirs[:, 2]).max() / (theirs[:, 2].std() + 1e-6)
        bad += np.abs(ours[:, :2] - theirs[:, :2]).max() > 1 or score_error > 0.05
    return bad


def compare_losses(losses: dict[str, torch.Tensor], case: Case) -> list[str]:
    """Compare training losses by name."""
    expected = case.facts["losses"]
    have = {name: loss.item() for name, loss in losses.items()}
    return [f"losses: {name} is missing" for name in sorted(expected.keys() - have.keys())] + [
        f"losses: {name} {value:.6g}, expected {expected.get(name, 0.0):.6g}"
        for name, value in have.items()
        if not abs(value - expected.get(name, 0.0)) <= RTOL * max(abs(expected.get(name, 0.0)), 1e-3)
    ]


def compare_counts(counts: dict[str, float], case: Case) -> list[str]:
    """Compare the logged numbers of foreground and background anchors and proposals per image."""
    return [
        f"counts: {name} {counts.get(name)}, expected {expected}"
        for name, expected in case.facts.get("num_fg", {}).items()
        if counts.get(name) != expected
    ]


def compare_gradients(model: torch.nn.Module, case: Case) -> list[str]:
    """Compare which parameters are trainable, and the norms of their gradients."""
    alias = case.facts.get("alias", {})
    have = {
        alias.get(name, name): p.grad.norm().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    expected = {alias.get(name, name): norm for name, norm in case.facts["grad_norms"].items()}
    floor = 1e-4 * max(expected.values())
    return (
        [f"gradients: {name} should be trainable" for name in sorted(expected.keys() - have.keys())]
        + [f"gradients: {name} should be frozen" for name in sorted(have.keys() - expected.keys())]
        + [
            f"gradients: {name} has norm {have[name]:.5g}, expected {expected[name]:.5g}"
            for name in sorted(have.keys() & expected.keys())
            if not abs(have[name] - expected[name]) <= 10 * RTOL * max(expected[name], floor)
        ]
    )
