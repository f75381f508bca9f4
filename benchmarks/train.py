"""Time training steps of Mask R-CNN R-50-FPN against torchvision's model, and the overhead of the trainer.

    python benchmarks/train.py [--steps 5] [--images 2] [--short-side 800] [--amp] [--threads 2]

Both models train on the same images, boxes and masks in memory, with SGD, frozen batch norm and the first two
stages frozen. Their steps alternate, so that other programs slow them down equally.

detlib's steps run in DefaultTrainer with all its default hooks and writers, as in a real training run. The
trainer's overhead is the time of a step outside the forward pass, the backward pass and the optimizer. The
images are in memory, so loading costs nothing. torchvision's steps are a bare loop without hooks.
"""

import argparse
import contextlib
import logging
import platform
import statistics
import tempfile
import time

import numpy as np
import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from detlib import model_zoo
from detlib.engine import DefaultTrainer
from detlib.structures import BitMasks, Boxes, Instances
from detlib.utils.events import EventStorage

NUM_CLASSES, OBJECTS = 81, 8  # not the default 80, which the classes of the dataset would replace


def make_batch(count: int, short_side: int, device: torch.device) -> list[dict]:
    """Return random images of aspect ratio 4 : 3, with boxes and box-shaped masks, as inputs of detlib."""
    rng = np.random.default_rng(0)
    height, width = short_side, round(short_side * 4 / 3)
    batch = []
    for k in range(count):
        sizes = np.exp(rng.uniform(np.log(16), np.log(height / 2), (OBJECTS, 2)))
        corners = rng.uniform(0, 1, (OBJECTS, 2)) * ([width, height] - sizes)
        boxes = np.concatenate([corners, corners + sizes], axis=1)
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int).tolist()):
            mask[y0 : y1 + 1, x0 : x1 + 1] = True
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.as_tensor(rng.integers(0, NUM_CLASSES, OBJECTS))
        instances.gt_masks = BitMasks(masks)
        image = torch.as_tensor(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        batch.append({"image": image, "instances": instances.to(device), "height": height, "width": width,
                      "file_name": f"random_{k}.jpg", "image_id": k})  # fmt: skip
    return batch


def as_torchvision(batch: list[dict], device: torch.device) -> tuple[list, list]:
    """Convert a batch to the inputs of torchvision's model, where class 0 is the background."""
    images = [(d["image"].float() / 255).to(device) for d in batch]
    targets = [
        {
            "boxes": d["instances"].gt_boxes.tensor,
            "labels": d["instances"].gt_classes + 1,
            "masks": d["instances"].gt_masks.tensor.to(torch.uint8),
        }
        for d in batch
    ]
    return images, targets


class Clock:
    """A clock that adds up the seconds spent in functions. With CUDA, it synchronizes before each reading."""

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __call__(self) -> float:
        self._wait()
        return time.perf_counter()

    def around(self, function):
        """Return `function`, with the time of its calls added to `seconds`."""

        def timed(*args, **kwargs):
            start = self()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self() - start

        return timed


class BenchmarkTrainer(DefaultTrainer):
    """The default trainer on one batch in memory."""

    fixed_batch: list[dict]

    def _check_num_classes(self, cfg) -> None:
        """Do nothing: the dataset of the config has other classes, but is not used."""

    @classmethod
    def build_train_loader(cls, cfg):
        class Loader:
            def __iter__(self):
                while True:
                    yield cls.fixed_batch

        return Loader()


def bound_activations(model: torch.nn.Module) -> None:
    """Scale down the residual branches of a ResNet with random weights.

    With frozen batch norm, activations would otherwise grow from block to block until float16 overflows.
    """
    for name, module in model.named_modules():
        if name.endswith(("conv3.norm", "bn3")):
            module.weight.fill_(0.2)


def build_trainer(args: argparse.Namespace, folder: str, device: torch.device) -> BenchmarkTrainer:
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = str(device)
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]  # as in torchvision's model
    cfg.OUTPUT_DIR = folder
    cfg.DATASETS.TRAIN = ("shapes:train?num=8&size=64",)
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.IMS_PER_BATCH = args.images
    cfg.SOLVER.BASE_LR = 1e-5
    cfg.SOLVER.MAX_ITER = 10**6
    cfg.SOLVER.AMP.ENABLED = args.amp
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    BenchmarkTrainer.fixed_batch = make_batch(args.images, args.short_side, device)
    trainer = BenchmarkTrainer(cfg)
    trainer.resume_or_load(resume=False)
    bound_activations(trainer.model)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="steps of each side, after two warm-up steps")
    parser.add_argument("--images", type=int, default=2, help="images in a batch")
    parser.add_argument("--short-side", type=int, default=800, help="height of the images in pixels")
    parser.add_argument("--amp", action="store_true", help="mixed precision on both sides")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="number of PyTorch threads on the CPU"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, inside = Clock(device), Clock(device)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        trainer = build_trainer(args, folder, device)
        inner = trainer._trainer
        for name in ("_forward", "_backward", "_update"):
            setattr(inner, name, inside.around(getattr(inner, name)))
        backbone = resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
        )
        reference = MaskRCNN(backbone, NUM_CLASSES + 1, min_size=args.short_side, max_size=1333).to(device)
        bound_activations(reference)
        reference.train()
        optimizer = torch.optim.SGD(
            [p for p in reference.parameters() if p.requires_grad], lr=1e-5, momentum=0.9
        )
        images, targets = as_torchvision(trainer.fixed_batch, device)
        precision = torch.float16 if device.type == "cuda" else torch.bfloat16
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp and precision == torch.float16)

        def torchvision_step() -> None:
            with torch.autocast(device.type, dtype=precision, enabled=args.amp):
                losses = sum(reference(images, targets).values())
            optimizer.zero_grad()
            scaler.scale(losses).backward()
            scaler.step(optimizer)
            scaler.update()

        times: dict[str, list[float]] = {"detlib": [], "overhead": [], "torchvision": []}
        with EventStorage(0) as trainer.storage:
            trainer.before_train()
            for k in range(args.steps + 2):
                start, inside.seconds = clock(), 0.0
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
                trainer.iter += 1
                middle = clock()
                torchvision_step()
                end = clock()
                if k >= 2:
                    times["detlib"].append(middle - start)
                    times["overhead"].append(middle - start - inside.seconds)
                    times["torchvision"].append(end - middle)
    report(args, device, {name: statistics.median(seconds) for name, seconds in times.items()})


def report(args: argparse.Namespace, device: torch.device, median: dict[str, float]) -> None:
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    precision = "mixed" if args.amp else "full"
    print(f"torch {torch.__version__}, {where}, {args.threads} threads, {precision} precision")
    print(f"Mask R-CNN R-50-FPN, {args.images} images of height {args.short_side}, medians of {args.steps}")
    for name in ("detlib", "torchvision"):
        seconds = median[name]
        print(f"  {name:12} {seconds * 1e3:9.1f} ms per step {args.images / seconds:8.2f} images/s")
    print(f"  ratio of images per second: {median['torchvision'] / median['detlib']:.2f}")
    share = 100 * median["overhead"] / median["detlib"]
    print(f"  overhead of the trainer: {median['overhead'] * 1e3:.2f} ms per step, {share:.2f} %")


if __name__ == "__main__":
    main()
