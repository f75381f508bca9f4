"""The checkpointer of detection models."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from detlib.checkpoint.checkpointer import Checkpointer, IncompatibleKeys
from detlib.checkpoint.key_matching import match_by_longest_suffix
from detlib.utils import comm

__all__ = ["DetectionCheckpointer"]

# Settings that a model keeps as buffers: a file without them leaves them as the config says.
_SETTING_BUFFERS = ("pixel_mean", "pixel_std")
_ANCHOR_BUFFERS = "anchor_generator.cell_anchors"


class DetectionCheckpointer(Checkpointer):
    """A `Checkpointer` that also reads model-zoo ``.pkl`` files and works in distributed training.

    A file with the entry "matching_heuristics" may hold a part of the model under shorter names, which are
    matched to the model's by their longest common ending.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, save_to_disk: bool | None = None, **checkpointables
    ):
        """As `Checkpointer`; `save_to_disk` None means: only on the main process."""
        if save_to_disk is None:
            save_to_disk = comm.is_main_process()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """As `Checkpointer.load`.

        In distributed training every process must call this. Processes that cannot see the file (no shared
        disk) get its content from the main process.
        """
        return super().load(path, *args, **kwargs)

    def _load_file(self, path: str) -> dict[str, Any]:
        if not self.is_distributed or comm.get_world_size() == 1:
            return super()._load_file(path)
        has_file = comm.all_gather(os.path.isfile(self.path_manager.get_local_path(path)))
        if all(has_file) or not any(has_file):
            return super()._load_file(path)
        if not has_file[0]:
            raise FileNotFoundError(f"Checkpoint file {path} does not exist on the main process")
        content = [super()._load_file(path) if comm.is_main_process() else None]
        dist.broadcast_object_list(content, src=0)
        return content[0]

    def _rename_keys(self, state: dict[str, torch.Tensor], checkpoint: Mapping) -> dict[str, torch.Tensor]:
        if not checkpoint.get("matching_heuristics", False):
            return state
        shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        return match_by_longest_suffix(shapes, state)

    def _load_model(self, checkpoint: dict[str, Any]) -> IncompatibleKeys | None:
        missing, unexpected, wrong = super()._load_model(checkpoint)
        own_buffers = {name for name, _ in self.model.named_buffers(remove_duplicate=False)}
        missing = [n for n in missing if not (n in _SETTING_BUFFERS and n in own_buffers)]
        # Files of old releases hold the anchors, which follow from the config.
        unexpected = [n for n in unexpected if _ANCHOR_BUFFERS not in n]
        return IncompatibleKeys(missing, unexpected, wrong)
