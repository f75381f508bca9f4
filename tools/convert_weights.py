"""Convert weight files from the names of other libraries to those of detlib, and between formats.

    python tools/convert_weights.py resnet50.pth R-50.pkl --convert torchvision
    python tools/convert_weights.py detectron_model.pkl model.pth
    python tools/convert_weights.py model_final.pth model.safetensors

The extension of the output selects its format: ``.pth``, ``.pkl`` (as in the model zoo) or ``.safetensors``.
The input may be any path or URL that MODEL.WEIGHTS accepts.
"""

import argparse
import os
import pickle
import sys
from typing import Any

import numpy as np
import torch

from detlib.checkpoint.conversions import CONVERSIONS, get_conversion
from detlib.checkpoint.formats import read_checkpoint, write_checkpoint
from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.file_io import PathManager

OUTPUT_ENDINGS = (".pth", ".pkl", ".safetensors")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="path or URL of a weight file")
    parser.add_argument("output", help=f"file to write, ending in {', '.join(OUTPUT_ENDINGS)}")
    parser.add_argument(
        "--convert",
        choices=list(CONVERSIONS),
        help="source library of the input; files of Detectron and Caffe2 are recognized automatically",
    )
    parser.add_argument(
        "--trust", action="store_true", help="allow the input to run code while it is unpickled"
    )
    args = parser.parse_args()
    if os.path.splitext(args.output)[1] not in OUTPUT_ENDINGS:
        parser.error(f"the output {args.output} must end in one of {', '.join(OUTPUT_ENDINGS)}")
    return args


def convert(content: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Apply a conversion, or by default the one for the type of file, and print the new names."""
    if name is None and content.get("__author__") == "Caffe2":
        name = "caffe2"
    before = content["model"]
    if name is None:
        print(f"{len(before)} arrays keep their names")
        return content
    after = get_conversion(name).convert(before)
    old_names = {id(value): old for old, value in before.items()}
    for new, value in after.items():
        print(f"{old_names.get(id(value), '(changed)')} -> {new} {tuple(value.shape)}")
    print(f"{len(after)} of {len(before)} arrays are kept, named as in detlib ({name})")
    # The names are relative to a backbone or head, whose position in the model is unknown.
    return {"model": after, "__author__": name, "matching_heuristics": True}


def write(path: str, content: dict[str, Any]) -> None:
    if not path.endswith(".pkl"):
        write_checkpoint(path, content)
        return
    arrays = {name: np.asarray(value) for name, value in content["model"].items()}
    content = {"__author__": "detlib"} | content | {"model": arrays}
    write_bytes_atomically(path, lambda file: pickle.dump(content, file))


def main() -> int:
    args = parse_args()
    try:
        content = read_checkpoint(PathManager.get_local_path(args.input), trust=args.trust)
        if args.output.endswith(".pkl"):  # model-zoo files have only parameters
            content = {
                k: v for k, v in content.items() if k in ("model", "__author__", "matching_heuristics")
            }
        write(args.output, convert(content, args.convert))
    except (OSError, ValueError, KeyError) as e:
        print(e, file=sys.stderr)
        return 1
    size = os.path.getsize(args.output) / 1e6 if os.path.isfile(args.output) else float("nan")
    print(f"wrote {args.output}, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
