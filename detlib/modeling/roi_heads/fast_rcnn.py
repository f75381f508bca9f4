"""The Fast R-CNN box predictor (arXiv:1504.08083): layers, losses and inference.

Shape legend: R regions of all images together, R_i those of one image, K classes (label K is the background),
B numbers per box (4, or 5 for rotated boxes).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detlib.config import CfgNode, configurable
from detlib.layers import ShapeSpec, cat, cross_entropy, nonzero_tuple
from detlib.modeling.box_regression import (
    BOX_LOSS_TYPES,
    Box2BoxTransform,
    box2box_transform_for,
    box_regression_loss,
)
from detlib.modeling.config_checks import check_choice, check_count, config_keys
from detlib.structures import Boxes, Instances
from detlib.utils.events import get_event_storage, has_event_storage

__all__ = ["FastRCNNOutputLayers", "fast_rcnn_inference", "fast_rcnn_inference_single_image"]


def fast_rcnn_inference(
    boxes: Sequence[torch.Tensor],
    scores: Sequence[torch.Tensor],
    image_shapes: list[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    box_type: type[Boxes] = Boxes,
) -> tuple[list[Instances], list[torch.Tensor]]:
    """Select the detections of each image, see `fast_rcnn_inference_single_image`.

    Args:
        boxes: for each image (R_i, K * B), or (R_i, B) if boxes are class-agnostic; absolute pixels.
        scores: for each image (R_i, K + 1) probabilities, the background last.
        image_shapes: (height, width) of each image.
        score_thresh: detections must score above this.
        nms_thresh: IoU above which the lower scoring of two boxes of a class is dropped.
        topk_per_image: maximum number of detections per image; negative for all.
        box_type: the type of the boxes, which implements clipping and NMS.

    Returns:
        The detections of each image (`pred_boxes`, `scores`, `pred_classes`, in descending score order), and
        for each image the rows of `boxes` that they come from, (detections,) int64.
    """
    results = [
        fast_rcnn_inference_single_image(
            image_boxes, image_scores, shape, score_thresh, nms_thresh, topk_per_image, box_type
        )
        for image_boxes, image_scores, shape in zip(boxes, scores, image_shapes)
    ]
    return [r[0] for r in results], [r[1] for r in results]


def fast_rcnn_inference_single_image(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    box_type: type[Boxes] = Boxes,
) -> tuple[Instances, torch.Tensor]:
    """Threshold the scores, clip the boxes, apply NMS to each class and keep the best.

    Regions with a box or score that is not finite are dropped. Arguments and results are those of
    `fast_rcnn_inference` for one image.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = scores[:, :-1]
    boxes = boxes.unflatten(1, (-1, box_type.box_dim))  # (R_i, K or 1, B)
    rows, classes = nonzero_tuple((scores > score_thresh) & finite[:, None])
    candidates = box_type(boxes[rows, 0 if boxes.shape[1] == 1 else classes])
    candidates.clip(image_shape)
    scores = scores[rows, classes]
    keep = candidates.batched_nms(scores, classes, nms_thresh)
    if topk_per_image >= 0:
        keep = keep[:topk_per_image]
    result = Instances(
        image_shape, pred_boxes=candidates[keep], scores=scores[keep], pred_classes=classes[keep]
    )
    return result, rows[keep]


def _log_classification_stats(logits: torch.Tensor, gt_classes: torch.Tensor) -> None:
    """Log accuracy, foreground accuracy and the fraction of foreground classified as background."""
    if gt_classes.numel() == 0 or not has_event_storage():
        return
    background = logits.shape[1] - 1
    predicted = logits.argmax(dim=1)
    right = predicted == gt_classes
    foreground = (gt_classes >= 0) & (gt_classes < background)
    counted = (right, foreground, right & foreground, foreground & (predicted == background))
    # Fetched together, which synchronizes a GPU once.
    counts = torch.stack([mask.sum() for mask in counted]).tolist()
    num_right, num_foreground, num_foreground_right, num_missed = counts
    storage = get_event_storage()
    storage.put_scalar("fast_rcnn/cls_accuracy", num_right / gt_classes.numel())
    if num_foreground > 0:
        storage.put_scalar("fast_rcnn/fg_cls_accuracy", num_foreground_right / num_foreground)
        storage.put_scalar("fast_rcnn/false_negative", num_missed / num_foreground)


def _weights_not_set() -> torch.Tensor:
    """Raise ValueError: a model built from a config has no class weights, as it does not read datasets."""
    raise ValueError(
        "FastRCNNOutputLayers: the federated loss (MODEL.ROI_BOX_HEAD.USE_FED_LOSS) has no class weights. "
        "DefaultTrainer takes them from the training data; other training loops call "
        "provide_fed_loss_cls_weights, for example with detlib.data.detection_utils.get_fed_loss_cls_weights."
    )


class FastRCNNOutputLayers(nn.Module):
    """Two linear layers that predict class scores and box deltas of each region."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec | int,
        *,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        test_score_thresh: float = 0.0,
        test_nms_thresh: float = 0.5,
        test_topk_per_image: int = 100,
        cls_agnostic_bbox_reg: bool = False,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        loss_weight: float | dict[str, float] = 1.0,
        use_fed_loss: bool = False,
        use_sigmoid_ce: bool = False,
        get_fed_loss_cls_weights: Callable[[], torch.Tensor] | torch.Tensor | None = None,
        fed_loss_num_classes: int = 50,
    ):
        """
        Args:
            input_shape: shape of a region's features; an int is the number of channels.
            box2box_transform: `Box2BoxTransform`, or `Box2BoxTransformRotated` for rotated boxes.
            num_classes: K, without the background.
            test_score_thresh: detections must score above this.
            test_nms_thresh: IoU threshold of NMS.
            test_topk_per_image: maximum number of detections per image.
            cls_agnostic_bbox_reg: whether to predict one box per region instead of one per class.
            smooth_l1_beta: transition point from quadratic to linear; 0 is the L1 loss.
            box_reg_loss_type: "smooth_l1", "giou", "diou" or "ciou".
            loss_weight: one factor for all losses, or a dict with "loss_cls" and "loss_box_reg".
            use_fed_loss: whether to use the federated loss (arXiv:2103.07461), on the classes that are
                present and some sampled ones; needs `use_sigmoid_ce`.
            use_sigmoid_ce: whether to use one sigmoid per class instead of the softmax.
            get_fed_loss_cls_weights: sampling weights of the classes for the federated loss, a (K,) tensor or
                a function that returns it, called when the loss is first computed.
            fed_loss_num_classes: number of classes in the federated loss.

        Raises:
            ValueError: the loss type is unknown, or the federated loss has no weights or no sigmoids.
        """
        super().__init__()
        if isinstance(input_shape, int):
            input_shape = ShapeSpec(channels=input_shape)
        check_choice(box_reg_loss_type, BOX_LOSS_TYPES, "FastRCNNOutputLayers: box_reg_loss_type")
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.box_dim = box2box_transform.box_dim
        input_size = math.prod((input_shape.channels, input_shape.height or 1, input_shape.width or 1))
        self.cls_score = nn.Linear(input_size, num_classes + 1)
        self.bbox_pred = nn.Linear(input_size, (1 if cls_agnostic_bbox_reg else num_classes) * self.box_dim)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

        self.smooth_l1_beta = smooth_l1_beta
        self.test_score_thresh = test_score_thresh
        self.test_nms_thresh = test_nms_thresh
        self.test_topk_per_image = test_topk_per_image
        self.box_reg_loss_type = box_reg_loss_type
        if not isinstance(loss_weight, dict):
            loss_weight = {"loss_cls": loss_weight, "loss_box_reg": loss_weight}
        self.loss_weight = loss_weight
        self.use_fed_loss = use_fed_loss
        self.use_sigmoid_ce = use_sigmoid_ce
        self.fed_loss_num_classes = fed_loss_num_classes
        self.register_buffer("fed_loss_cls_weights", None, persistent=False)
        if use_fed_loss:
            self._init_fed_loss(get_fed_loss_cls_weights)

    def _init_fed_loss(self, weights: Callable[[], torch.Tensor] | torch.Tensor | None) -> None:
        if not self.use_sigmoid_ce:
            raise ValueError(
                "FastRCNNOutputLayers: use_fed_loss needs use_sigmoid_ce = True "
                "(MODEL.ROI_BOX_HEAD.USE_FED_LOSS and USE_SIGMOID_CE)."
            )
        if weights is not None and callable(weights):
            self._get_fed_loss_cls_weights = weights
        else:
            self._set_fed_loss_weights(weights)

    def provide_fed_loss_cls_weights(self, weights: Callable[[], torch.Tensor]) -> None:
        """Set the class weights of the federated loss of a model that was built from a config.

        Without a federated loss, and where weights were given to the constructor, nothing changes.

        Args:
            weights: a function that returns (K,) sampling weights, called when the loss is first computed.
        """
        if self.use_fed_loss and getattr(self, "_get_fed_loss_cls_weights", None) is _weights_not_set:
            self._get_fed_loss_cls_weights = weights

    def _set_fed_loss_weights(self, weights: torch.Tensor | None) -> None:
        if weights is None or tuple(weights.shape) != (self.num_classes,):
            found = "none" if weights is None else f"shape {tuple(weights.shape)}"
            raise ValueError(
                "FastRCNNOutputLayers: use_fed_loss needs get_fed_loss_cls_weights, sampling weights of the "
                f"{self.num_classes} classes (a tensor, or a function that returns it); got {found}."
            )
        self.fed_loss_cls_weights = weights.to(self.cls_score.weight.device, torch.float32)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        head = cfg.MODEL.ROI_BOX_HEAD
        check_count(cfg.MODEL.ROI_HEADS.NUM_CLASSES, "MODEL.ROI_HEADS.NUM_CLASSES")
        check_choice(head.BBOX_REG_LOSS_TYPE, BOX_LOSS_TYPES, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE")
        with config_keys("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"):
            transform = box2box_transform_for(head.BBOX_REG_WEIGHTS)
        return {
            "input_shape": input_shape,
            "box2box_transform": transform,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "cls_agnostic_bbox_reg": head.CLS_AGNOSTIC_BBOX_REG,
            "smooth_l1_beta": head.SMOOTH_L1_BETA,
            "test_score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "test_nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "box_reg_loss_type": head.BBOX_REG_LOSS_TYPE,
            "loss_weight": {"loss_box_reg": head.BBOX_REG_LOSS_WEIGHT},
            "use_fed_loss": head.USE_FED_LOSS,
            "use_sigmoid_ce": head.USE_SIGMOID_CE,
            "fed_loss_num_classes": head.FED_LOSS_NUM_CLASSES,
            "get_fed_loss_cls_weights": _weights_not_set,
        }

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the scores and box deltas of each region.

        Args:
            x: (R, ...) features; all dimensions after the first are flattened.

        Returns:
            (R, K + 1) logits, the background last, and (R, K * B) deltas, or (R, B) if class-agnostic.
        """
        x = x.flatten(start_dim=1)
        return self.cls_score(x), self.bbox_pred(x)

    def losses(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """Compute the classification and box regression losses of sampled regions.

        Args:
            predictions: the result of `forward` for R regions.
            proposals: N sampled `Instances` with `proposal_boxes`, `gt_classes` (K for background) and, if
                the image has objects, `gt_boxes`; R in total.

        Returns:
            {"loss_cls": scalar, "loss_box_reg": scalar}, weighted; zeros that still require grad if R is 0.
        """
        logits, deltas = predictions
        logits = logits.float()
        if proposals:
            fields = [p.get_fields() for p in proposals]
            gt_classes = cat([f["gt_classes"] for f in fields])
            proposal_boxes = cat([f["proposal_boxes"].tensor for f in fields])
            # Images without objects have no ground-truth boxes, and their regions need none.
            gt_boxes = cat([f.get("gt_boxes", f["proposal_boxes"]).tensor for f in fields])
        else:
            gt_classes = torch.empty(0, dtype=torch.int64, device=logits.device)
            proposal_boxes = gt_boxes = logits.new_empty((0, self.box_dim))
        if proposal_boxes.requires_grad:
            raise ValueError("FastRCNNOutputLayers: proposal boxes must not require gradients; detach them.")
        _log_classification_stats(logits.detach(), gt_classes)
        if self.use_sigmoid_ce:
            loss_cls = self.sigmoid_cross_entropy_loss(logits, gt_classes)
        else:
            loss_cls = cross_entropy(logits, gt_classes, reduction="mean")
        losses = {
            "loss_cls": loss_cls,
            "loss_box_reg": self.box_reg_loss(proposal_boxes, gt_boxes, deltas, gt_classes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def get_fed_loss_classes(
        self, gt_classes: torch.Tensor, num_fed_loss_classes: int, num_classes: int, weight: torch.Tensor
    ) -> torch.Tensor:
        """Select the classes of the federated loss: all that are present, and some sampled ones.

        Args:
            gt_classes: (R,) int64 in [0, K].
            num_fed_loss_classes: minimum number of classes; more may be present.
            num_classes: K.
            weight: (K,) sampling weights of absent classes.

        Returns:
            int64 labels without repetition, including K, the background, if it is present.
        """
        present = torch.unique(gt_classes)
        weights = torch.cat([weight.float(), weight.new_zeros(1, dtype=torch.float32)])
        weights[present] = 0
        num_sampled = min(num_fed_loss_classes - len(present), int((weights > 0).sum()))
        if num_sampled <= 0:
            return present
        return torch.cat([present, torch.multinomial(weights, num_sampled, replacement=False)])

    def sigmoid_cross_entropy_loss(
        self, pred_class_logits: torch.Tensor, gt_classes: torch.Tensor
    ) -> torch.Tensor:
        """Compute the binary cross-entropy, summed over classes and averaged over regions.

        Args:
            pred_class_logits: (R, K + 1); the last column is not used.
            gt_classes: (R,) int64 in [0, K]; background regions are negatives of every class.

        Returns:
            Scalar; zero that still requires grad if R is 0.
        """
        num_regions, num_classes = pred_class_logits.shape[0], pred_class_logits.shape[1] - 1
        if num_regions == 0:
            return pred_class_logits.sum() * 0
        logits = pred_class_logits[:, :-1]
        target = F.one_hot(gt_classes, num_classes + 1)[:, :-1].to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if self.use_fed_loss:
            if self.fed_loss_cls_weights is None:
                self._set_fed_loss_weights(self._get_fed_loss_cls_weights())
            chosen = self.get_fed_loss_classes(
                gt_classes, self.fed_loss_num_classes, num_classes, self.fed_loss_cls_weights
            )
            mask = loss.new_zeros(num_classes + 1)
            mask[chosen] = 1
            loss = loss * mask[:-1]
        return loss.sum() / num_regions

    def box_reg_loss(
        self,
        proposal_boxes: torch.Tensor,
        gt_boxes: torch.Tensor,
        pred_deltas: torch.Tensor,
        gt_classes: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the box loss of the foreground, summed and divided by the number of all regions.

        As all regions count in the divisor, the weight of a foreground region does not depend on the number
        of foreground regions.

        Args:
            proposal_boxes: (R, B), absolute pixels.
            gt_boxes: (R, B) matched ground-truth boxes; rows of background regions are ignored.
            pred_deltas: (R, K * B), or (R, B).
            gt_classes: (R,) int64 in [0, K].

        Returns:
            Scalar float32.
        """
        (foreground,) = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))
        deltas = pred_deltas.unflatten(1, (-1, self.box_dim))  # (R, K or 1, B)
        chosen = 0 if deltas.shape[1] == 1 else gt_classes[foreground]
        loss = box_regression_loss(
            self.box2box_transform,
            proposal_boxes[foreground],
            deltas[foreground, chosen].float(),
            gt_boxes[foreground],
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        return loss / max(gt_classes.numel(), 1.0)

    def inference(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """Select the detections of each image.

        Args:
            predictions: the result of `forward`.
            proposals: N `Instances` with `proposal_boxes`, the regions of the predictions.

        Returns:
            See `fast_rcnn_inference`.
        """
        return fast_rcnn_inference(
            self.predict_boxes(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [x.image_size for x in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
            type(proposals[0].proposal_boxes) if proposals else Boxes,
        )

    def predict_boxes_for_gt_classes(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> tuple[torch.Tensor, ...]:
        """Return for each image the (R_i, B) boxes of the regions' ground-truth classes.

        Background regions get the box of class K - 1.
        """
        if not proposals:
            return ()
        boxes = cat(self.predict_boxes(predictions, proposals))
        boxes = boxes.unflatten(1, (-1, self.box_dim))
        gt_classes = cat([p.gt_classes for p in proposals]).clamp(0, boxes.shape[1] - 1)
        boxes = boxes[torch.arange(len(boxes), device=boxes.device), gt_classes]
        return boxes.split([len(p) for p in proposals])

    def predict_boxes(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> tuple[torch.Tensor, ...]:
        """Return for each image the (R_i, K * B), or (R_i, B), decoded boxes in absolute pixels."""
        if not proposals:
            return ()
        boxes = [p.proposal_boxes.tensor for p in proposals]
        sizes = [len(image_boxes) for image_boxes in boxes]
        return self.box2box_transform.apply_deltas(predictions[1], cat(boxes)).split(sizes)

    def predict_probs(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> tuple[torch.Tensor, ...]:
        """Return for each image the (R_i, K + 1) float32 class probabilities, the background last."""
        logits = predictions[0].float()
        probs = logits.sigmoid() if self.use_sigmoid_ce else logits.softmax(dim=-1)
        return probs.split([len(p) for p in proposals])
