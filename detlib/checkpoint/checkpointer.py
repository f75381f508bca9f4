"""Saves and loads a model together with whatever else has a state."""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detlib.checkpoint.background import BackgroundWriter, copy_to_host
from detlib.checkpoint.formats import read_checkpoint, to_plain_types, write_checkpoint
from detlib.checkpoint.key_matching import LoadReport, strip_common_prefix
from detlib.checkpoint.sharded import gather_shards, is_sharded, shard_like
from detlib.utils import comm
from detlib.utils.atomic_write import remove_unfinished_files, write_bytes_atomically
from detlib.utils.file_io import PathManager

__all__ = ["Checkpointer", "IncompatibleKeys", "PeriodicCheckpointer"]

logger = logging.getLogger(__name__)


class IncompatibleKeys(NamedTuple):
    """How a file's parameters differ from the model's."""

    missing_keys: list[str]
    """In the model, not in the file."""
    unexpected_keys: list[str]
    """In the file, not in the model."""
    incorrect_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    """(name, shape in the file, shape in the model)."""


class Checkpointer:
    """Saves and loads a model and any number of objects with ``state_dict`` and ``load_state_dict``.

    A checkpoint is a ``.pth`` file of one dict: the parameters under "model", and each other object's state
    under its name. The file "last_checkpoint" beside it names the newest one.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool = True,
        async_save: bool = False,
        **checkpointables,
    ):
        """
        Args:
            model: a model; wrappers for parallel training are taken off.
            save_dir: folder of the checkpoints.
            save_to_disk: False makes `save` do nothing, as on all processes but one.
            async_save: `save` copies everything to main memory and returns; a thread writes it. Should
                writing fail, the next `save`, `load` or `wait` raises the error.
            **checkpointables: the other objects, by the name that they have in the file.
        """
        self.is_distributed = isinstance(model, DistributedDataParallel)
        self.model = comm.unwrap(model)
        self.save_dir = save_dir
        self.save_to_disk = save_to_disk
        self.path_manager = PathManager
        self.report: LoadReport | None = None
        """What the last `load` did."""
        self._background = BackgroundWriter() if async_save else None
        self.checkpointables: dict[str, Any] = {}
        for key, checkpointable in checkpointables.items():
            self.add_checkpointable(key, checkpointable)

    def add_checkpointable(self, key: str, checkpointable: Any) -> None:
        """Add an object whose state is saved and loaded under `key`.

        Raises:
            KeyError: if `key` is in use.
            TypeError: if the object lacks ``state_dict`` or ``load_state_dict``.
        """
        if key in self.checkpointables or key == "model":
            raise KeyError(f"The checkpointer already has an object under '{key}'")
        for method in ("state_dict", "load_state_dict"):
            if not callable(getattr(checkpointable, method, None)):
                raise TypeError(f"'{key}' ({type(checkpointable).__name__}) has no method {method}()")
        self.checkpointables[key] = checkpointable

    def save(self, name: str, **kwargs: Any) -> None:
        """Save a checkpoint to ``save_dir/name.pth`` and makes it the last one.

        The file appears whole or not at all: a crash leaves the former one, and its mark, in place.

        Args:
            name: file name without ending. With the ending ``.safetensors``, the parameters alone are saved
                in that format, and the mark of the last checkpoint stays where it is.
            **kwargs: more entries, of plain types.

        Raises:
            TypeError: if something to save is of no plain type.
        """
        mark = None if name.endswith(".safetensors") else f"{name}.pth"
        self._write(name, kwargs, mark)

    def write(self, name: str, **kwargs: Any) -> bool:
        """As `save`, but the mark of the last checkpoint stays where it is.

        Returns:
            Whether a file is written: without `save_dir` or `save_to_disk` none is.
        """
        return self._write(name, kwargs, mark=None)

    def _write(self, name: str, entries: dict[str, Any], mark: str | None) -> bool:
        """Write a file and then `mark`, now or in the background."""
        sharded = is_sharded(self.model)
        if not self.save_dir or not (self.save_to_disk or sharded):
            return False
        content = {"model": self.model.state_dict()}
        for key, checkpointable in self.checkpointables.items():
            content[key] = checkpointable.state_dict()
        if sharded:
            # Every process holds a part, so all of them come here.
            content = gather_shards(content, keep=self.save_to_disk)
            if not self.save_to_disk:
                return False
        content = to_plain_types(content | entries, "checkpoint")
        if self._background is not None:
            content = copy_to_host(content)
        path = os.path.join(self.save_dir, name if name.endswith(".safetensors") else f"{name}.pth")

        def write_file() -> None:
            self.path_manager.mkdirs(self.save_dir)
            write_checkpoint(path, content)
            if mark is not None:
                self.tag_last_checkpoint(mark)
            logger.info("Saved checkpoint %s", path)

        self.then(write_file)
        return True

    def then(self, task: Callable[[], None]) -> None:
        """Run `task` when all that was saved before is on disk: now, or in the background."""
        if self._background is None:
            task()
        else:
            self._background.submit(task)

    def wait(self) -> None:
        """Return when all that was saved is on disk, or raises the error that kept it from there."""
        if self._background is not None:
            self._background.wait()

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, trust: bool = False
    ) -> dict[str, Any]:
        """Load a checkpoint into the model and the other objects.

        Args:
            path: a file or an address that `PathManager` knows; "" leaves the model as it is.
            checkpointables: names of the objects to load, None for all. Those that the file lacks keep
                their state.
            trust: let the file run any code while it is unpickled. Only for files of your own.

        Returns:
            The file's other entries.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no checkpoint, or would run code.
            KeyError: if `checkpointables` names an unknown object.
        """
        if not path:
            logger.info("No checkpoint given: the model starts from its random initialization")
            return {}
        self.wait()
        logger.info("Loading checkpoint %s", path)
        checkpoint = self._load_file(path, trust)
        self.report = LoadReport(path)
        incompatible = self._load_model(checkpoint)
        if incompatible is not None:
            self.report.missing_keys, self.report.unexpected_keys, self.report.incorrect_shapes = incompatible
            self.report.log()
        wanted = self.checkpointables if checkpointables is None else checkpointables
        for key in wanted:
            if key not in self.checkpointables:
                raise KeyError(f"'{key}' is none of the checkpointer's objects: {list(self.checkpointables)}")
            if key in checkpoint:
                logger.info("Loading the state of '%s' from %s", key, path)
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
            else:
                logger.warning("%s has no state of '%s': it starts afresh", path, key)
        return checkpoint

    def has_checkpoint(self) -> bool:
        """Whether `save_dir` has a last checkpoint."""
        self.wait()
        return self.path_manager.exists(self._mark_path)

    def get_checkpoint_file(self) -> str:
        """Path of the last checkpoint in `save_dir`, "" if there is none."""
        if not self.has_checkpoint():
            return ""
        with self.path_manager.open(self._mark_path, "r") as f:
            return os.path.join(self.save_dir, f.read().strip())

    def get_all_checkpoint_files(self) -> list[str]:
        """Path of all ``.pth`` files in `save_dir`, in the order of their names."""
        self.wait()
        if not self.path_manager.isdir(self.save_dir):
            return []
        paths = [os.path.join(self.save_dir, name) for name in sorted(self.path_manager.ls(self.save_dir))]
        return [path for path in paths if path.endswith(".pth") and self.path_manager.isfile(path)]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint of `save_dir` with all states, or else only the model of `path`.

        Args:
            path: what to start from if `resume` is False or there is no last checkpoint.
            resume: whether to go on from the last checkpoint.

        Returns:
            What `load` returns.
        """
        if resume and self.save_dir and self.save_to_disk:
            self.wait()
            remove_unfinished_files(self.save_dir)
        if resume and self.has_checkpoint():
            return self.load(self.get_checkpoint_file())
        if resume and self.save_dir:
            logger.info("There is no checkpoint in %s to resume from", self.save_dir)
        return self.load(path, checkpointables=[])

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make a file of `save_dir` the one that `get_checkpoint_file` names."""
        write_bytes_atomically(self._mark_path, lambda f: f.write(last_filename_basename.encode()))

    @property
    def _mark_path(self) -> str:
        return os.path.join(self.save_dir, "last_checkpoint")

    def _load_file(self, path: str, trust: bool = False) -> dict[str, Any]:
        """Read the file at `path`, or at the address `path`."""
        return read_checkpoint(self.path_manager.get_local_path(path), trust=trust)

    def _load_model(self, checkpoint: dict[str, Any]) -> IncompatibleKeys:
        """Remove "model" from `checkpoint` and copy the tensors that fit into the model."""
        state = {name: _to_tensor(value, name) for name, value in checkpoint.pop("model").items()}
        old_names = {id(value): name for name, value in state.items()}
        state = strip_common_prefix(state, "module.")
        state = self._rename_keys(state, checkpoint)
        own = {name: value for name, value in self.model.state_dict().items() if has_shape(value)}
        wrong = [
            (name, tuple(value.shape), tuple(own[name].shape))
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ]
        for name, _, _ in wrong:
            del state[name]
        placed = state
        if is_sharded(self.model):
            placed = {name: shard_like(x, own[name]) if name in own else x for name, x in state.items()}
        result = self.model.load_state_dict(placed, strict=False)
        skipped = {name for name, _, _ in wrong}
        missing = [name for name in result.missing_keys if name not in skipped]
        assert self.report is not None, "`load` makes a report before it loads the model"
        self.report.loaded = [name for name in own if name in state]
        before = {name: old_names.get(id(state[name]), name) for name in self.report.loaded}
        self.report.renamed = {name: old for name, old in before.items() if old != name}
        unexpected = [old_names.get(id(state[name]), name) for name in result.unexpected_keys]
        return IncompatibleKeys(missing, unexpected, wrong)

    def _rename_keys(self, state: dict[str, torch.Tensor], checkpoint: Mapping) -> dict[str, torch.Tensor]:
        """For subclasses: gives the file's parameters the model's names."""
        return state


class PeriodicCheckpointer:
    """Saves ``PREFIX_0004999.pth`` and the like, and ``PREFIX_final.pth`` after the last iteration."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_iter: int | None = None,
        max_to_keep: int | None = None,
        file_prefix: str = "model",
    ):
        """
        Args:
            checkpointer: what saves.
            period: number of iterations between two files; 0 or less saves the final one only.
            max_iter: number of iterations in the whole training, None if there is no last one.
            max_to_keep: how many files to keep, the oldest being removed; None keeps all. The final file
                does not count.
            file_prefix: how file names begin.

        Raises:
            ValueError: if `max_to_keep` is less than 1.
        """
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep must be None or at least 1, got {max_to_keep}")
        self.checkpointer = checkpointer
        self.period = int(period)
        self.max_iter = max_iter
        self.max_to_keep = max_to_keep
        self.file_prefix = file_prefix
        self.path_manager = checkpointer.path_manager
        self.recent_checkpoints: list[str] = []

    def step(self, iteration: int, **kwargs: Any) -> None:
        """Save if it is time to.

        Args:
            iteration: the iteration that has just been done, in [0, max_iter - 1].
            **kwargs: more entries for the file.
        """
        state = {"iteration": iteration, **kwargs}
        if self._is_periodic(iteration):
            name = f"{self.file_prefix}_{iteration:07d}"
            self._note(f"{name}.pth")
            self.checkpointer.save(name, **state)
            self._remove_old()
        if self._is_final(iteration):
            self.checkpointer.save(f"{self.file_prefix}_final", **state)

    def save(self, name: str, **kwargs: Any) -> None:
        """Save now, under a name of your own, which is never removed."""
        self.checkpointer.save(name, **kwargs)

    def _is_periodic(self, iteration: int) -> bool:
        return self.period > 0 and (iteration + 1) % self.period == 0

    def _is_final(self, iteration: int) -> bool:
        return self.max_iter is not None and iteration >= self.max_iter - 1

    def _note(self, newest: str) -> None:
        """Count a file in before it is saved, so that the state within it knows of it."""
        path = os.path.join(self.checkpointer.save_dir, newest)
        self.recent_checkpoints = [old for old in self.recent_checkpoints if old != path] + [path]

    def _remove_old(self) -> None:
        """Forget and deletes the oldest file once there are more than `max_to_keep`."""
        if self.max_to_keep is None or not self.checkpointer.save_to_disk:
            return
        while len(self.recent_checkpoints) > self.max_to_keep:
            old = self.recent_checkpoints.pop(0)
            # Only when the newest one is safe on disk.
            self.checkpointer.then(functools.partial(self._remove, old))

    def _remove(self, path: str) -> None:
        if self.path_manager.exists(path):
            self.path_manager.rm(path)

    def state_dict(self) -> dict[str, Any]:
        """Which files to remove in time, so that a resumed training goes on with it."""
        return {"recent_checkpoints": [os.path.basename(path) for path in self.recent_checkpoints]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = self.checkpointer.save_dir
        self.recent_checkpoints = [os.path.join(folder, name) for name in state_dict["recent_checkpoints"]]


def has_shape(value: Any) -> bool:
    """False for extra states and for parameters of lazy modules, which have no shape yet."""
    return isinstance(value, torch.Tensor) and not nn.parameter.is_lazy(value)


def _to_tensor(value: Any, name: str) -> Any:
    """Turn the arrays of a ``.pkl`` into tensors; each entry gets an object of its own."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray | np.generic):
        return torch.as_tensor(np.asarray(value))
    if not name.endswith("_extra_state"):
        raise ValueError(f"The checkpoint's entry '{name}' is a {type(value).__name__}, not an array")
    return value
