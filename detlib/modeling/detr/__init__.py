"""DETR, Deformable DETR and DINO: detectors with object queries, each of which predicts at most one object.

Their building blocks (`MultiheadAttention`, `FFN`, position embeddings and more) are defined in
`detlib.layers` and re-exported here.
"""

from detlib.layers import (
    FFN,
    MLP,
    BaseTransformerLayer,
    MultiheadAttention,
    MultiScaleDeformableAttention,
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    TransformerLayerSequence,
    get_sine_pos_embed,
)
from detlib.modeling.detr.criterion import DeformableCriterion, DINOCriterion, SetCriterion, TwoStageCriterion
from detlib.modeling.detr.deformable_detr import DeformableDETR
from detlib.modeling.detr.deformable_layers import (
    DeformableDetrTransformerDecoder,
    DeformableDetrTransformerEncoder,
)
from detlib.modeling.detr.deformable_transformer import DeformableDetrTransformer
from detlib.modeling.detr.denoising import apply_box_noise, apply_label_noise, make_denoising_queries
from detlib.modeling.detr.detr import DETR
from detlib.modeling.detr.detr_transformer import (
    DetrTransformer,
    DetrTransformerDecoder,
    DetrTransformerEncoder,
)
from detlib.modeling.detr.dino import DINO
from detlib.modeling.detr.dino_transformer import (
    DINOTransformer,
    DINOTransformerDecoder,
    DINOTransformerEncoder,
)
from detlib.modeling.detr.matcher import HungarianMatcher

__all__ = [
    "BaseTransformerLayer",
    "DETR",
    "DINO",
    "DINOCriterion",
    "DINOTransformer",
    "DINOTransformerDecoder",
    "DINOTransformerEncoder",
    "DeformableCriterion",
    "DeformableDETR",
    "DeformableDetrTransformer",
    "DeformableDetrTransformerDecoder",
    "DeformableDetrTransformerEncoder",
    "DetrTransformer",
    "DetrTransformerDecoder",
    "DetrTransformerEncoder",
    "FFN",
    "HungarianMatcher",
    "MLP",
    "MultiScaleDeformableAttention",
    "MultiheadAttention",
    "PositionEmbeddingLearned",
    "PositionEmbeddingSine",
    "SetCriterion",
    "TransformerLayerSequence",
    "TwoStageCriterion",
    "apply_box_noise",
    "apply_label_noise",
    "get_sine_pos_embed",
    "make_denoising_queries",
]
