"""Time training steps of Mask R-CNN R-50 FPN: the trainer's own cost, and torchvision's model beside it.

    python benchmarks/train.py [--steps 5] [--images 2] [--short-side 800] [--amp] [--threads 2]

Both models train on the same pictures, boxes and masks in memory, with SGD, frozen BatchNorm and the first
two stages frozen, their steps in turn, so that they meet the same noise. detlib's steps go through
DefaultTrainer with all its default hooks and writers, as in a real run; its own cost is what a step takes
outside forward pass, backward pass and the optimizer's update (the pictures are there already, so loading
costs nothing). torchvision's steps are a bare loop without any of this.
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

NUM_CLASSES, OBJECTS = 81, 8  # not the default 80, which would be replaced by the number of the data named


def make_batch(count: int, short_side: int, device: torch.device) -> list[dict]:
    """Pictures of random pixels in the shape 3 : 4, with boxes and box-shaped masks, as detlib takes them."""
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
    """The same pictures as torchvision's model takes them, whose class 0 is the background."""
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
    """Adds up the seconds spent in some functions; with CUDA, waits for the device at both ends."""

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __call__(self) -> float:
        self._wait()
        return time.perf_counter()

    def around(self, function):
        def timed(*args, **kwargs):
            start = self()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self() - start

        return timed


class BenchmarkTrainer(DefaultTrainer):
    """The default trainer on one batch in memory."""

    pictures: list[dict]

    def _check_num_classes(self, cfg) -> None:
        """The data that the config names, which are not used, have other classes."""

    @classmethod
    def build_train_loader(cls, cfg):
        class Loader:
            def __iter__(self):
                while True:
                    yield cls.pictures

        return Loader()


def bound_activations(model: torch.nn.Module) -> None:
    """Weaken the branches of a ResNet of random weights.

    Under frozen BatchNorm their sums would grow from block to block until float16 overflows.
    """
    for name, module in model.named_modules():
        if name.endswith(("conv3.norm", "bn3")):
            module.weight.fill_(0.2)


def build_trainer(args: argparse.Namespace, folder: str, device: torch.device) -> BenchmarkTrainer:
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = str(device)
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]  # as torchvision's model has them
    cfg.OUTPUT_DIR = folder
    cfg.DATASETS.TRAIN = ("shapes:train?num=8&size=64",)
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.IMS_PER_BATCH = args.images
    cfg.SOLVER.BASE_LR = 1e-5
    cfg.SOLVER.MAX_ITER = 10**6
    cfg.SOLVER.AMP.ENABLED = args.amp
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    BenchmarkTrainer.pictures = make_batch(args.images, args.short_side, device)
    trainer = BenchmarkTrainer(cfg)
    trainer.resume_or_load(resume=False)
    bound_activations(trainer.model)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of each side, after two that do not count"
    )
    parser.add_argument("--images", type=int, default=2, help="pictures in a batch")
    parser.add_argument("--short-side", type=int, default=800, help="their height in pixels")
    parser.add_argument("--amp", action="store_true", help="mixed precision on both sides")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on the CPU")
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
        peer = MaskRCNN(backbone, NUM_CLASSES + 1, min_size=args.short_side, max_size=1333).to(device)
        bound_activations(peer)
        peer.train()
        optimizer = torch.optim.SGD([p for p in peer.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)
        images, targets = as_torchvision(trainer.pictures, device)
        precision = torch.float16 if device.type == "cuda" else torch.bfloat16
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp and precision == torch.float16)

        def peer_step() -> None:
            with torch.autocast(device.type, dtype=precision, enabled=args.amp):
                losses = sum(peer(images, targets).values())
            optimizer.zero_grad()
            scaler.scale(losses).backward()
            scaler.step(optimizer)
            scaler.update()

        times: dict[str, list[float]] = {"detlib": [], "own": [], "torchvision": []}
        with EventStorage(0) as trainer.storage:
            trainer.before_train()
            for k in range(args.steps + 2):
                start, inside.seconds = clock(), 0.0
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
                trainer.iter += 1
                middle = clock()
                peer_step()
                end = clock()
                if k >= 2:
                    times["detlib"].append(middle - start)
                    times["own"].append(middle - start - inside.seconds)
                    times["torchvision"].append(end - middle)
    report(args, device, {name: statistics.median(seconds) for name, seconds in times.items()})


def report(args: argparse.Namespace, device: torch.device, median: dict[str, float]) -> None:
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    precision = "mixed" if args.amp else "full"
    print(f"torch {torch.__version__}, {where}, {args.threads} threads, {precision} precision")
    print(f"Mask R-CNN R-50 FPN, {args.images} pictures of height {args.short_side}, medians of {args.steps}")
    for name in ("detlib", "torchvision"):
        seconds = median[name]
        print(f"  {name:12} {seconds * 1e3:9.1f} ms a step {args.images / seconds:8.2f} pictures/s")
    print(f"  ratio of pictures per second: {median['torchvision'] / median['detlib']:.2f}")
    share = 100 * median["own"] / median["detlib"]
    print(f"  the trainer's own cost: {median['own'] * 1e3:.2f} ms a step, {share:.2f} % of it")


if __name__ == "__main__":
    main()
