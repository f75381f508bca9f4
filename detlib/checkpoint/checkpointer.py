"""Saving and loading of a model together with other objects that have a state."""

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

_LONGEST_NAME = 255


class IncompatibleKeys(NamedTuple):
    """The differences between the parameters of a file and those of a model."""

    missing_keys: list[str]
    """Names in the model that are not in the file."""
    unexpected_keys: list[str]
    """Names in the file that are not in the model."""
    incorrect_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    """(name, shape in the file, shape in the model)."""


class Checkpointer:
    """A tool that saves and loads a model and other objects with ``state_dict`` and ``load_state_dict``.

    A checkpoint is a ``.pth`` file with one dict: the parameters under "model", and the state of each other
    object under its name. The file "last_checkpoint" in the same folder has the name of the latest
    checkpoint.
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
            model: a model, which may be wrapped for parallel training.
            save_dir: folder of the checkpoints.
            save_to_disk: whether `save` writes files. In distributed training, only one process should.
            async_save: let `save` return after copying everything to main memory, and write the file in a
                background thread. If writing fails, the next `save`, `load` or `wait` raises the error.
            **checkpointables: the other objects, by their name in the file.
        """
        self.is_distributed = isinstance(model, DistributedDataParallel)
        self.model = comm.unwrap(model)
        self.save_dir = save_dir
        self.save_to_disk = save_to_disk
        self.path_manager = PathManager
        self.report: LoadReport | None = None
        """Report of the last `load`."""
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
        """Save a checkpoint to ``save_dir/name.pth`` and mark it as the last one.

        The file is written atomically: after a crash, the previous checkpoint and its mark are still in
        place.

        Args:
            name: file name without extension. With the extension ``.safetensors``, only the parameters are
                saved, in that format, and the mark of the last checkpoint does not change.
            **kwargs: additional entries, of plain types.

        Raises:
            TypeError: if an entry or a state is not of plain types.
        """
        mark = None if name.endswith(".safetensors") else f"{name}.pth"
        self._write(name, kwargs, mark)

    def write(self, name: str, **kwargs: Any) -> bool:
        """Save a checkpoint like `save`, without marking it as the last one.

        Returns:
            Whether a file is written. Without `save_dir` or `save_to_disk`, none is.
        """
        return self._write(name, kwargs, mark=None)

    def _write(self, name: str, entries: dict[str, Any], mark: str | None) -> bool:
        """Write a file and then `mark`, immediately or in the background."""
        sharded = is_sharded(self.model)
        if not self.save_dir or not (self.save_to_disk or sharded):
            return False
        content = {"model": self.model.state_dict()}
        for key, checkpointable in self.checkpointables.items():
            content[key] = checkpointable.state_dict()
        if sharded:
            # Every process has a shard, so all of them must take part.
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
        """Run `task` once all previous saves are on disk: immediately, or in the background."""
        if self._background is None:
            task()
        else:
            self._background.submit(task)

    def wait(self) -> None:
        """Wait until everything is on disk. Raise the error of a failed save."""
        if self._background is not None:
            self._background.wait()

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, trust: bool = False
    ) -> dict[str, Any]:
        """Load a checkpoint into the model and the other objects.

        Args:
            path: a file, or a URL that `PathManager` supports; "" leaves the model unchanged.
            checkpointables: names of the objects to load, None for all. Objects that are not in the file keep
                their state.
            trust: allow the file to run any code while it is unpickled. Use it only for your own files.

        Returns:
            The other entries of the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a checkpoint, would run code, or has parameters or states that
                cannot be loaded. The message names the file.
            KeyError: if a name in `checkpointables` is unknown.
        """
        if not path:
            logger.info("No checkpoint given: the model starts from random initialization")
            return {}
        self.wait()
        logger.info("Loading checkpoint %s", path)
        checkpoint = self._load_file(path, trust)
        self.report = LoadReport(path)
        try:
            incompatible = self._load_model(checkpoint)
        except (AttributeError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(f"Checkpoint file {path} cannot be loaded: {e}") from e
        if incompatible is not None:
            self.report.missing_keys, self.report.unexpected_keys, self.report.incorrect_shapes = incompatible
            self.report.log()
        names = self.checkpointables if checkpointables is None else checkpointables
        for key in names:
            if key not in self.checkpointables:
                raise KeyError(f"The checkpointer has no object '{key}', only {list(self.checkpointables)}")
            if key in checkpoint:
                logger.info("Loading the state of '%s' from %s", key, path)
                self._load_state(key, checkpoint.pop(key))
            else:
                logger.warning("%s has no state of '%s', which keeps its initial state", path, key)
        return checkpoint

    def _load_state(self, key: str, state: Any) -> None:
        """Load the state of an object, which fails in many ways if the state is of something else."""
        assert self.report is not None, "`load` creates the report first"
        try:
            self.checkpointables[key].load_state_dict(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
            reason = str(e) if isinstance(e, (RuntimeError, ValueError)) else f"{type(e).__name__}: {e}"
            raise ValueError(
                f"The state of '{key}' in checkpoint file {self.report.path} cannot be loaded: {reason}"
            ) from e

    def has_checkpoint(self) -> bool:
        """Return whether `save_dir` has a last checkpoint."""
        self.wait()
        return self.path_manager.exists(self._mark_path)

    def get_checkpoint_file(self) -> str:
        """Return the path of the last checkpoint in `save_dir`, or "" if there is none.

        Raises:
            ValueError: if the mark does not hold the name of a file in `save_dir`.
        """
        if not self.has_checkpoint():
            return ""
        with self.path_manager.open(self._mark_path, "rb") as f:
            name = f.read(_LONGEST_NAME + 1).decode("utf-8", "replace").strip()
        if not _is_file_name(name):
            raise ValueError(
                f"{self._mark_path} must hold the name of a file in its folder, got {name[:80]!r}. Write the "
                "name of the checkpoint to resume from into it, or remove it"
            )
        return os.path.join(self.save_dir, name)

    def get_all_checkpoint_files(self) -> list[str]:
        """Return the paths of all ``.pth`` files in `save_dir`, sorted by name."""
        self.wait()
        if not self.path_manager.isdir(self.save_dir):
            return []
        paths = [os.path.join(self.save_dir, name) for name in sorted(self.path_manager.ls(self.save_dir))]
        return [path for path in paths if path.endswith(".pth") and self.path_manager.isfile(path)]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint of `save_dir` with all states, or else only the model from `path`.

        Args:
            path: checkpoint to start from if `resume` is False or there is no last checkpoint.
            resume: whether to resume from the last checkpoint.

        Returns:
            The result of `load`.
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
        """Mark a file in `save_dir` as the last checkpoint, which `get_checkpoint_file` returns."""
        write_bytes_atomically(self._mark_path, lambda f: f.write(last_filename_basename.encode()))

    @property
    def _mark_path(self) -> str:
        return os.path.join(self.save_dir, "last_checkpoint")

    def _load_file(self, path: str, trust: bool = False) -> dict[str, Any]:
        """Read the file at a path or URL."""
        return read_checkpoint(self.path_manager.get_local_path(path), trust=trust)

    def _load_model(self, checkpoint: dict[str, Any]) -> IncompatibleKeys:
        """Remove "model" from `checkpoint` and copy the tensors with matching shapes to the model."""
        state = {name: _to_tensor(value, name) for name, value in checkpoint.pop("model").items()}
        own = {name: value for name, value in self.model.state_dict().items() if has_shape(value)}
        old_names = {id(value): name for name, value in state.items()}
        state, prefix = strip_common_prefix(state, own)
        if prefix:
            logger.info("Removed the prefix '%s' that all names in the checkpoint have", prefix)
        state = self._rename_keys(state, checkpoint)
        wrong = [
            (name, tuple(value.shape), tuple(own[name].shape))
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ]
        for name, _, _ in wrong:
            del state[name]
        _check_values({name: value for name, value in state.items() if name in own}, own)
        local = state
        if is_sharded(self.model):
            local = {name: shard_like(x, own[name]) if name in own else x for name, x in state.items()}
        result = self.model.load_state_dict(local, strict=False)
        skipped = {name for name, _, _ in wrong}
        missing = [name for name in result.missing_keys if name not in skipped]
        assert self.report is not None, "`load` creates the report before it loads the model"
        self.report.loaded = [name for name in own if name in state]
        before = {name: old_names.get(id(state[name]), name) for name in self.report.loaded}
        self.report.renamed = {name: old for name, old in before.items() if old != prefix + name}
        unexpected = [old_names.get(id(state[name]), name) for name in result.unexpected_keys]
        return IncompatibleKeys(missing, unexpected, wrong)

    def _rename_keys(self, state: dict[str, torch.Tensor], checkpoint: Mapping) -> dict[str, torch.Tensor]:
        """Rename the parameters of the file to those of the model. Subclasses may override this."""
        return state


class PeriodicCheckpointer:
    """Periodic saving of ``PREFIX_0004999.pth`` etc., and ``PREFIX_final.pth`` after the last iteration."""

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
            checkpointer: the checkpointer that saves the files.
            period: number of iterations between two files; with 0 or less, only the final file is saved.
            max_iter: total number of iterations, or None if there is no last iteration.
            max_to_keep: number of files to keep; the oldest ones are removed. None keeps all. The final file
                does not count.
            file_prefix: prefix of the file names.

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
        """Save a checkpoint if one is due after this iteration.

        Args:
            iteration: the iteration that was just completed, in [0, max_iter - 1].
            **kwargs: additional entries for the file.
        """
        state = {"iteration": iteration, **kwargs}
        if self._is_periodic(iteration):
            name = f"{self.file_prefix}_{iteration:07d}"
            self._record(f"{name}.pth")
            self.checkpointer.save(name, **state)
            self._remove_old()
        if self._is_final(iteration):
            self.checkpointer.save(f"{self.file_prefix}_final", **state)

    def save(self, name: str, **kwargs: Any) -> None:
        """Save a checkpoint now, under a given name. It is never removed."""
        self.checkpointer.save(name, **kwargs)

    def _is_periodic(self, iteration: int) -> bool:
        return self.period > 0 and (iteration + 1) % self.period == 0

    def _is_final(self, iteration: int) -> bool:
        return self.max_iter is not None and iteration >= self.max_iter - 1

    def _record(self, newest: str) -> None:
        """Record a file before it is saved, so that the state in the file includes it."""
        path = os.path.join(self.checkpointer.save_dir, newest)
        self.recent_checkpoints = [old for old in self.recent_checkpoints if old != path] + [path]

    def _remove_old(self) -> None:
        """Delete the oldest files if there are more than `max_to_keep`."""
        if self.max_to_keep is None or not self.checkpointer.save_to_disk:
            return
        while len(self.recent_checkpoints) > self.max_to_keep:
            old = self.recent_checkpoints.pop(0)
            # Only once the newest file is on disk.
            self.checkpointer.then(functools.partial(self._remove, old))

    def _remove(self, path: str) -> None:
        if self.path_manager.exists(path):
            self.path_manager.rm(path)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of recent files, so that a resumed training run continues to remove old ones."""
        return {"recent_checkpoints": [os.path.basename(path) for path in self.recent_checkpoints]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = state_dict["recent_checkpoints"]
        if not all(isinstance(name, str) and _is_file_name(name) for name in names):
            # These files are removed later.
            raise ValueError(f"recent_checkpoints must be names of files without folders, got {names}")
        self.recent_checkpoints = [os.path.join(self.checkpointer.save_dir, name) for name in names]


def has_shape(value: Any) -> bool:
    """Return whether a value has a shape. Extra states and parameters of lazy modules have none."""
    return isinstance(value, torch.Tensor) and not nn.parameter.is_lazy(value)


def _is_file_name(name: str) -> bool:
    """Return whether a name is that of a file in a folder, and does not lead out of the folder."""
    legal = 0 < len(name) <= _LONGEST_NAME and name.isprintable() and name not in (".", "..")
    return legal and not set(name) & set("/\\:")


def _check_values(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Warn of values that are not finite.

    Raises:
        ValueError: if an array is complex and the parameter is not.
    """
    broken = []
    for name, value in state.items():
        if not has_shape(value):
            continue
        if value.is_complex() and not own[name].is_complex():
            raise ValueError(
                f"'{name}' has the complex type {value.dtype}, but the model's has {own[name].dtype}"
            )
        # The sum needs no memory, and is finite if all values are, unless it overflows.
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
            # Masks of attention may have infinite values in the model, too.
            if value.isnan().any() or own[name].isfinite().all():
                broken.append(name)
    if broken:
        logger.warning(
            "%d of the loaded parameters and buffers have values that are NaN or infinite, so the results "
            "will be wrong; perhaps the training run that saved them diverged: %s",
            len(broken),
            ", ".join(broken[:5]) + (" ..." if len(broken) > 5 else ""),
        )


def _to_tensor(value: Any, name: str) -> Any:
    """Convert an array of a ``.pkl`` file to a tensor. Each entry becomes a separate object."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        try:
            return torch.as_tensor(array)
        except TypeError as e:
            raise ValueError(f"its entry '{name}' has the type {array.dtype}, which is not a number") from e
    if not name.endswith("_extra_state"):
        raise ValueError(f"its entry '{name}' is a {type(value).__name__}, not an array")
    return value
