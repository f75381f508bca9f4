"""Every architecture trains and predicts after `model.to(dtype)`, on uint8 and on float images."""

import pytest
import torch

from detlib.structures import Instances
from detlib.utils.events import EventStorage
from tests.modeling.architectures import ARCHITECTURES, architecture_batch, build_architecture
from tests.modeling.detr.small_models import batch, small_deformable_detr, small_detr, small_dino

QUERY_MODELS = {
    "detr": small_detr,
    "deformable_detr": small_deformable_detr,
    "deformable_detr_refine": lambda: small_deformable_detr(with_box_refine=True),
    "deformable_detr_two_stage": lambda: small_deformable_detr(with_box_refine=True, as_two_stage=True),
    "dino": small_dino,
}
# In the default run, with bfloat16 only; the others share their code or are slow on CPUs.
DEFAULT_RUN = {"mask_rcnn", "retinanet", "panoptic", "fcos", *QUERY_MODELS}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases():
    for name in [*ARCHITECTURES, *QUERY_MODELS]:
        for dtype in DTYPES:
            for image_dtype in (torch.uint8, torch.float32):
                fast = name in DEFAULT_RUN and dtype == torch.bfloat16
                case_id = f"{name}-{str(dtype)[6:]}-{str(image_dtype)[6:]}"
                yield pytest.param(
                    name, dtype, image_dtype, id=case_id, marks=() if fast else pytest.mark.slow
                )


def items_of(name: str, image_dtype: torch.dtype) -> list[dict]:
    items = batch() if name in QUERY_MODELS else architecture_batch(name)
    return [{**item, "image": item["image"].to(image_dtype)} for item in items]


def floats_of(output: dict):
    """Yield every floating point tensor in the output of one image."""
    for value in output.values():
        if isinstance(value, Instances):
            fields = [getattr(x, "tensor", x) for x in value.get_fields().values()]
            yield from (x for x in fields if x.is_floating_point())
        elif isinstance(value, torch.Tensor):
            yield value


@pytest.mark.parametrize(("name", "dtype", "image_dtype"), list(cases()))
def test_model_trains_and_predicts_in_its_dtype(name, dtype, image_dtype):
    torch.manual_seed(0)
    model = (QUERY_MODELS[name]() if name in QUERY_MODELS else build_architecture(name)).to(dtype)
    items = items_of(name, image_dtype)
    assert model.preprocess_image(items).tensor.dtype == dtype
    with EventStorage():
        losses = model.train()(items)
    sum(losses.values()).backward()
    with torch.no_grad():
        outputs = model.eval()(items)
    assert losses and all(p.grad is None or p.grad.dtype == dtype for p in model.parameters())
    assert len(outputs) == len(items) and all(outputs)
    if dtype != torch.float16:  # random weights may overflow its range
        assert all(x.isfinite() for x in losses.values()), losses
        assert all(x.isfinite().all() for output in outputs for x in floats_of(output))
