"""Time predictions of Mask R-CNN R-50-FPN against torchvision's model.

    python benchmarks/predict.py [--images 1] [--short-side 800] [--amp] [--threads 2] [--runs 10]

Both models have random weights and detect 100 objects in each image; masks are pasted into full images. The
images are in the memory of the model's device. Both sides run in turn, so that other programs slow them down
equally.
"""

import argparse
import logging
import platform
import statistics
import time

import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn
from train import bound_activations

from detlib import model_zoo
from detlib.modeling import build_model

CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"


def build(device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return detlib's and torchvision's model, in eval mode."""
    cfg = model_zoo.get_config(CONFIG)
    cfg.MODEL.DEVICE = str(device)
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    models = (
        build_model(cfg),
        maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, box_score_thresh=0.0).to(device),
    )
    with torch.no_grad():
        for model in models:
            bound_activations(model)
    return tuple(model.eval() for model in models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1, help="images in a batch")
    parser.add_argument("--short-side", type=int, default=800, help="height of the images in pixels")
    parser.add_argument("--amp", action="store_true", help="mixed precision on both sides")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="number of PyTorch threads on the CPU"
    )
    parser.add_argument("--runs", type=int, default=10, help="runs of each side, after two warm-up runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.float16 if device.type == "cuda" else torch.bfloat16
    torch.manual_seed(0)
    detlib, torchvision = build(device)
    height, width = args.short_side, round(args.short_side * 4 / 3)
    images = [
        torch.randint(0, 256, (3, height, width), dtype=torch.uint8, device=device)
        for _ in range(args.images)
    ]
    inputs = [{"image": image, "height": height, "width": width} for image in images]
    scaled = [image.float() / 255 for image in images]
    times: dict[str, list[float]] = {"detlib": [], "torchvision": []}
    found: dict[str, int] = {}
    with torch.no_grad(), torch.autocast(device.type, precision, enabled=args.amp):
        for _ in range(args.runs + 2):
            for name, predict in (
                ("detlib", lambda: detlib(inputs)),
                ("torchvision", lambda: torchvision(scaled)),
            ):
                start = time.perf_counter()
                first = predict()[0]
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
                found[name] = len(first["instances"] if name == "detlib" else first["boxes"])

    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    precision_name = "mixed" if args.amp else "full"
    print(f"torch {torch.__version__}, {where}, {args.threads} threads, {precision_name} precision")
    print(f"Mask R-CNN R-50-FPN, {args.images} images of height {height}, medians of {args.runs}")
    medians = {name: statistics.median(seconds[2:]) for name, seconds in times.items()}
    for name, seconds in medians.items():
        speed = f"{seconds * 1e3:9.1f} ms {args.images / seconds:8.2f} images/s"
        print(f"  {name:12} {speed}, {found[name]} objects")
    print(f"  ratio of images per second: {medians['torchvision'] / medians['detlib']:.2f}")


if __name__ == "__main__":
    main()
