"""The checkpointer of detection models."""

import logging
import os
from typing import Any
from urllib.parse import parse_qsl

import torch
import torch.distributed as dist
from torch import nn

from detlib.checkpoint.checkpointer import Checkpointer, IncompatibleKeys, has_shape
from detlib.checkpoint.conversions import Conversion, get_conversion
from detlib.checkpoint.key_matching import match_by_longest_suffix, match_part
from detlib.utils import comm

__all__ = ["DetectionCheckpointer"]

logger = logging.getLogger(__name__)

# Settings that a model stores as buffers. If a file does not have them, they keep the values of the config.
_SETTING_BUFFERS = ("pixel_mean", "pixel_std")
_ANCHOR_BUFFERS = "anchor_generator.cell_anchors"
_BATCH_COUNT = ".num_batches_tracked"


class DetectionCheckpointer(Checkpointer):
    """A `Checkpointer` for distributed training, model-zoo files and weights of other libraries.

    A path may end in options, joined by ``&``:

    - ``?matching_heuristics=True``: the file has a part of the model, such as the backbone, under shorter
      names. They are matched to the names in the model by their longest common suffix. This is the default
      for converted files and for files with the entry "matching_heuristics".
    - ``?convert=NAME``: the file is from another library; see `detlib.checkpoint.conversions`. Files of
      Detectron and Caffe2 are recognized automatically.

    If no name in a file is a name in the model, as for the weights of a network of timm or torchvision, the
    file is loaded into the part of the model where its names match, if there is one. The log states which
    part.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, save_to_disk: bool | None = None, **kwargs):
        """
        Args:
            model: see `Checkpointer`.
            save_dir: see `Checkpointer`.
            save_to_disk: whether this process saves files; by default only the main process does.
            **kwargs: other arguments of `Checkpointer`.
        """
        if save_to_disk is None:
            save_to_disk = comm.is_main_process()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **kwargs)

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """Load a checkpoint like `Checkpointer.load`. The path may end in the options of this class.

        In distributed training, every process must call this. Processes that cannot access the file (no
        shared disk) receive its content from the main process.
        """
        return super().load(path, *args, **kwargs)

    def _load_file(self, path: str, trust: bool = False) -> dict[str, Any]:
        path, options = _split_options(path)
        content = self._load_shared_file(path, trust)
        if "convert" in options:
            content["convert"] = options["convert"]
        elif content.get("__author__") == "Caffe2":
            content["convert"] = "caffe2"
        if "matching_heuristics" in options:
            content["matching_heuristics"] = options["matching_heuristics"].lower() in ("true", "1")
        return content

    def _load_shared_file(self, path: str, trust: bool) -> dict[str, Any]:
        if not self.is_distributed or comm.get_world_size() == 1:
            return super()._load_file(path, trust)
        has_file = comm.all_gather(os.path.isfile(self.path_manager.get_local_path(path)))
        if all(has_file) or not any(has_file):
            return super()._load_file(path, trust)
        if not has_file[0]:
            raise FileNotFoundError(f"Checkpoint file {path} does not exist on the main process")
        content: list[Any] = [super()._load_file(path, trust) if comm.is_main_process() else None]
        dist.broadcast_object_list(content, src=0)
        return content[0]

    def _rename_keys(self, state: dict[str, torch.Tensor], checkpoint: dict) -> dict[str, torch.Tensor]:
        name = checkpoint.pop("convert", None)
        if name is not None:
            conversion = get_conversion(name)
            self._check_pixels(name, conversion)
            state = conversion.convert(state)
        # A tensor with multiple names is represented by its first name.
        first = {names[0]: tuple(value.shape) for names, value in self._names_of_tensors()}
        if name is not None or checkpoint.get("matching_heuristics", False):
            return self._with_other_names(match_by_longest_suffix(first, state))
        matched = match_part(first, state)
        if matched is not None:
            state, part = matched
            logger.info("The checkpoint has a part of the model: its weights are loaded into '%s'", part)
        return self._with_other_names(state)

    def _names_of_tensors(self) -> list[tuple[list[str], torch.Tensor]]:
        """Return each tensor of the model's state with all of its names, in order."""
        found: dict[int, tuple[list[str], torch.Tensor]] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if has_shape(value):
                found.setdefault(id(value), ([], value))[0].append(name)
        return list(found.values())

    def _with_other_names(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add the other names of tensors with multiple names, such as those of shared modules."""
        for names, _ in self._names_of_tensors():
            given = [name for name in names if name in state]
            if given and len(given) < len(names):
                state = dict.fromkeys(names, state[given[0]]) | state
        return state

    def _check_pixels(self, name: str, conversion: Conversion) -> None:
        """Warn if the channel order or pixel mean of the model differs from that of the weights."""
        wrong = []
        order = getattr(self.model, "input_format", None)
        if order not in (None, conversion.input_format):
            wrong.append(f"INPUT.FORMAT is {order!r} instead of {conversion.input_format!r}")
        mean = getattr(self.model, "pixel_mean", None)
        expected = torch.tensor(conversion.pixel_mean)
        if isinstance(mean, torch.Tensor):
            got = mean.detach().flatten().float().cpu()
            if got.shape != expected.shape or not torch.allclose(got, expected, atol=1.0):
                wrong.append(f"MODEL.PIXEL_MEAN is {got.tolist()} instead of {expected.tolist()}")
        if wrong:
            logger.warning("Weights of '%s' will perform poorly: %s", name, " and ".join(wrong))

    def _load_model(self, checkpoint: dict[str, Any]) -> IncompatibleKeys:
        missing, unexpected, wrong = super()._load_model(checkpoint)
        own_buffers = {name for name, _ in self.model.named_buffers(remove_duplicate=False)}
        missing = [n for n in missing if not (n in _SETTING_BUFFERS and n in own_buffers)]
        # Files of old releases include anchors, which the config determines. Frozen norms do not count
        # batches.
        unexpected = [n for n in unexpected if _ANCHOR_BUFFERS not in n and not n.endswith(_BATCH_COUNT)]
        return IncompatibleKeys(missing, unexpected, wrong)


def _split_options(path: str) -> tuple[str, dict[str, str]]:
    """Split the options of this file from the end of a path. Keep any other query of a URL."""
    base, _, query = path.rpartition("?")
    options = dict(parse_qsl(query)) if base else {}
    if options and set(options) <= {"matching_heuristics", "convert"}:
        return base, options
    return path, {}
