"""The losses of DINO: those of a two-stage model, and those of its denoising queries."""

from collections.abc import Mapping, Sequence

import torch

from detlib.modeling.detr.criterion import TwoStageCriterion
from detlib.modeling.detr.denoising import denoising_matches

__all__ = ["DINOCriterion"]


class DINOCriterion(TwoStageCriterion):
    """The losses of DINO; see `TwoStageCriterion` for the arguments.

    Denoising queries know which object they were made of, so they need no matching.
    """

    def forward(
        self, outputs: Mapping, targets: Sequence[Mapping], dn_metas: Mapping | None = None
    ) -> dict[str, torch.Tensor]:
        """The losses of all layers.

        Args:
            outputs: as of `TwoStageCriterion`.
            targets: as of `SetCriterion.forward`.
            dn_metas: what is known of the denoising queries: "single_padding" and "dn_num", see
                `make_denoising_queries`, and their predictions as "output_known_lbs_bboxes", which are like
                `outputs`; None without such queries.

        Returns:
            Losses as of `SetCriterion.forward`; those of the encoder end in "_enc", those of denoising
            queries in "_dn", "_dn_0" and so on, and are zero where there are no such queries.
        """
        num_boxes = self.count_boxes(targets, outputs["pred_boxes"].device)
        losses, _ = self._match_and_compare(outputs, targets, num_boxes)
        aux_num = len(outputs.get("aux_outputs", ()))
        losses.update(self.compute_dn_loss(dn_metas, targets, aux_num, num_boxes))
        return losses

    def compute_dn_loss(
        self,
        dn_metas: Mapping | None,
        targets: Sequence[Mapping],
        aux_num: int,
        num_boxes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The losses of denoising queries.

        Args:
            dn_metas, targets: see `forward`.
            aux_num: how many layers there are besides the last.
            num_boxes: the number of objects, see `count_boxes`.
        """
        suffixes = ["_dn", *(f"_dn_{i}" for i in range(aux_num))]
        if not dn_metas or "output_known_lbs_bboxes" not in dn_metas:
            zero = torch.zeros((), device=num_boxes.device)
            names = {"class": ("loss_class",), "boxes": ("loss_bbox", "loss_giou")}
            return {
                name + suffix: zero for suffix in suffixes for kind in self.losses for name in names[kind]
            }
        known = dn_metas["output_known_lbs_bboxes"]
        layers = [known, *known.get("aux_outputs", ())]
        counts = [len(t["labels"]) for t in targets]
        groups = dn_metas["dn_num"]
        device = known["pred_boxes"].device
        indices = denoising_matches(counts, dn_metas["single_padding"], groups, device)
        return {
            name + suffix: value
            for suffix, layer in zip(suffixes, layers)
            for kind in self.losses
            for name, value in self.get_loss(kind, layer, targets, indices, num_boxes * groups).items()
        }
