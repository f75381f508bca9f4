"""Changes from COCO to LVIS v1."""

from functools import partial

from detlib.config import LazyCall as L
from detlib.data.detection_utils import get_fed_loss_cls_weights
from detlib.data.samplers import RepeatFactorTrainingSampler
from detlib.evaluation import LVISEvaluator

from ...common.coco_schedule import steps


def use_lvis(dataloader, model):
    """Set the data, the classes, and a federated loss, since each image has labels for only some classes."""
    dataloader.train.dataset.names = "lvis_v1_train"
    dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
        repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
            dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.001
        )
    )
    dataloader.test.dataset.names = "lvis_v1_val"
    dataloader.evaluator = L(LVISEvaluator)(dataset_name="${..test.dataset.names}", max_dets_per_image=300)
    model.roi_heads.num_classes = 1203
    for predictor in model.roi_heads.get("box_predictors") or [model.roi_heads.box_predictor]:
        predictor.update(
            test_score_thresh=0.02,
            test_topk_per_image=300,
            use_sigmoid_ce=True,
            use_fed_loss=True,
            get_fed_loss_cls_weights=partial(
                get_fed_loss_cls_weights, dataset_names="lvis_v1_train", freq_weight_power=0.5
            ),
        )


def schedule_100ep(train):
    """Set 100 epochs of 100 000 images with a batch size of 64, and return the learning rate schedule."""
    train.max_iter, train.eval_period = 156250, 30000
    return steps([138889, 150463], train.max_iter, warmup_length=250 / train.max_iter)


def schedule_50ep(train):
    """Set half the length of `schedule_100ep`, and return the learning rate schedule."""
    train.max_iter, train.eval_period = 78125, 30000
    return steps([69444, 75231], train.max_iter, warmup_length=250 / train.max_iter)
