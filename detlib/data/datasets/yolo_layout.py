"""Ultralytics' dataset layout (https://docs.ultralytics.com/datasets/detect/): data.yaml, images and labels.

data.yaml           path: ROOT; train, val, test: a folder, a list file, or a list of these; names, nc;
                    for poses kpt_shape, and flip_idx if left and right differ
.../images/A.jpg    an image; its objects are in .../labels/A.txt, one per line
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import yaml

from detlib.utils.file_io import PathManager, is_remote
from detlib.utils.suggest import suggest

__all__ = [
    "IMAGE_SUFFIXES",
    "YoloConfig",
    "find_yolo_images",
    "join_path",
    "label_file_of",
    "read_yolo_config",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".mpo", ".dng", ".pfm")

# Suffixes of other files. Testing whether each is a folder would be slow in an object store.
_NO_FOLDERS = (".txt", ".json", ".xml", ".cache", ".npy")

_SPLITS = ("train", "val", "test")
_ALIASES = {"val": ("valid", "validation"), "valid": ("val",), "validation": ("val",)}


@dataclass(frozen=True)
class YoloConfig:
    """The content of a data.yaml.

    Attributes:
        file: path of the data.yaml.
        roots: folders that relative paths may start from, the most likely first.
        names: the classes in the order of their indices.
        splits: the locations of the images of each split, as written.
        kpt_shape: number of keypoints, and of values per keypoint (2 or 3); None without poses.
        flip_idx: for each keypoint, the index of the keypoint that replaces it under a horizontal flip; None
            if not given.
        kpt_names: names of the keypoints.
    """

    file: str
    roots: tuple[str, ...]
    names: list[str]
    splits: dict[str, list[str]]
    kpt_shape: tuple[int, int] | None = None
    flip_idx: tuple[int, ...] | None = None
    kpt_names: tuple[str, ...] = ()

    def split_name(self, split: str) -> str:
        """Return the key of a split; "val" finds "valid" too.

        Raises:
            ValueError: The split does not exist; the message lists the existing splits.
        """
        for name in (split, *_ALIASES.get(split, ())):
            if name in self.splits:
                return name
        existing = ", ".join(self.splits) or "none"
        raise ValueError(
            f"{self.file}: there is no split {split!r}, only: {existing}.{suggest(split, self.splits)}"
        )


def read_yolo_config(yaml_file: str) -> YoloConfig:
    """Read a data.yaml.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not YAML, or a key is missing or invalid; the message names the key.
    """
    if not PathManager.isfile(yaml_file):
        raise FileNotFoundError(f"Dataset file {yaml_file!r} does not exist.")
    with PathManager.open(yaml_file, "rb") as file:
        try:
            data = yaml.safe_load(file.read())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"Dataset file {yaml_file!r} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"Dataset file {yaml_file!r} must hold keys such as 'train', 'val' and 'names', not a "
            f"{type(data).__name__}."
        )
    kpt_shape = _kpt_shape(data, yaml_file)
    return YoloConfig(
        file=yaml_file,
        roots=_roots(data, yaml_file),
        names=_class_names(data, yaml_file),
        splits=_splits(data, yaml_file),
        kpt_shape=kpt_shape,
        flip_idx=_flip_idx(data, yaml_file, kpt_shape),
        kpt_names=_kpt_names(data, yaml_file, kpt_shape),
    )


def _roots(data: dict, yaml_file: str) -> tuple[str, ...]:
    """Return `path`, relative to the file's folder or the working directory; else the file's folder."""
    folder = os.path.dirname(yaml_file)
    path = data.get("path")
    if not path:
        return (folder,)
    path = os.path.expanduser(str(path))
    if os.path.isabs(path) or is_remote(path):
        return (path, folder)
    roots = (os.path.join(folder, path), folder) if is_remote(folder) else (os.path.join(folder, path), path)
    return (*dict.fromkeys((*roots, folder)),)


def _class_names(data: dict, yaml_file: str) -> list[str]:
    names = data.get("names")
    if isinstance(names, dict):
        keys = sorted(names, key=lambda key: (not isinstance(key, int), key if isinstance(key, int) else 0))
        if keys != [*range(len(names))]:
            raise ValueError(f"{yaml_file}: the keys of 'names' must be 0 to {len(names) - 1}, not {keys}.")
        names = [names[key] for key in keys]
    if names is None and isinstance(data.get("nc"), int):
        names = [f"class{i}" for i in range(data["nc"])]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{yaml_file}: 'names' must list the classes, got {names!r}.")
    if data.get("nc", len(names)) != len(names):
        raise ValueError(f"{yaml_file}: 'nc' is {data['nc']!r}, but 'names' has {len(names)} classes.")
    return [str(name) for name in names]


def _splits(data: dict, yaml_file: str) -> dict[str, list[str]]:
    aliases = [alias for group in _ALIASES.values() for alias in group]
    splits = {}
    for key in dict.fromkeys((*_SPLITS, *aliases)):
        paths = data.get(key)
        if not paths:
            continue
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError(
                f"{yaml_file}: {key!r} must be a folder, a list file or a list of these, got {paths!r}."
            )
        splits[key] = paths
    if not splits:
        raise ValueError(
            f"{yaml_file}: none of the keys 'train', 'val' and 'test' is set; the keys are {[*data]}."
        )
    return splits


def _kpt_shape(data: dict, yaml_file: str) -> tuple[int, int] | None:
    shape = data.get("kpt_shape")
    if shape is None:
        return None
    valid = isinstance(shape, list) and len(shape) == 2 and all(isinstance(number, int) for number in shape)
    if not valid or shape[0] < 1 or shape[1] not in (2, 3):
        raise ValueError(
            f"{yaml_file}: 'kpt_shape' must be [number of keypoints, 2 or 3 values for each], got {shape!r}."
        )
    return shape[0], shape[1]


def _flip_idx(data: dict, yaml_file: str, shape: tuple[int, int] | None) -> tuple[int, ...] | None:
    flip = data.get("flip_idx")
    if not flip or shape is None:
        return None
    if not isinstance(flip, list) or not all(type(i) is int for i in flip) or {*flip} != {*range(shape[0])}:
        raise ValueError(
            f"{yaml_file}: 'flip_idx' must hold each of 0 to {shape[0] - 1} once, as kpt_shape has "
            f"{shape[0]} keypoints; got {flip!r}."
        )
    for i, j in enumerate(flip):
        if flip[j] != i:
            raise ValueError(
                f"{yaml_file}: 'flip_idx' must swap keypoints in pairs: {i} becomes {j}, but {j} becomes "
                f"{flip[j]}."
            )
    return tuple(flip)


def _kpt_names(data: dict, yaml_file: str, shape: tuple[int, int] | None) -> tuple[str, ...]:
    if shape is None:
        return ()
    names: Any = data.get("kpt_names")
    if isinstance(names, dict):  # by class; here all classes must have the same keypoints
        names = next(iter(names.values()), None)
    if names is None:
        return tuple(f"keypoint_{i}" for i in range(shape[0]))
    if not isinstance(names, list) or len(names) != shape[0]:
        raise ValueError(
            f"{yaml_file}: 'kpt_names' must name {shape[0]} keypoints, as stated by kpt_shape; got {names!r}."
        )
    return tuple(map(str, names))


def find_yolo_images(config: YoloConfig, split: str) -> list[str]:
    """Return the paths of the images of a split: lists in their order, folders sorted by path.

    Raises:
        ValueError: The split does not exist, or has no images.
        FileNotFoundError: A folder or list does not exist; the message lists the paths tried.
    """
    images: dict[str, None] = {}
    for stated in config.splits[config.split_name(split)]:
        path = _find(stated, config)
        found = _walk(path) if PathManager.isdir(path) else _read_list(path, config)
        images.update(dict.fromkeys(found))
    if not images:
        stated_paths = config.splits[config.split_name(split)]
        raise ValueError(f"{config.file}: split {split!r} has no images in {', '.join(stated_paths)}.")
    return [*images]


def _find(stated: str, config: YoloConfig) -> str:
    stated = os.path.expanduser(stated)
    if os.path.isabs(stated) or is_remote(stated):
        tried = [stated]
    else:
        tried = [join_path(root, stated) for root in config.roots]
        if stated.startswith("../"):  # in Roboflow's exports this means the folder next to the file
            tried += [join_path(root, stated[3:]) for root in config.roots]
    for path in tried:
        if PathManager.exists(path):
            return path
    raise FileNotFoundError(f"{config.file}: {stated!r} was not found. Looked for: {', '.join(tried)}.")


def join_path(folder: str, path: str) -> str:
    """Join a folder and a path, and resolve `./` and `../`, which object stores do not know."""
    joined = os.path.join(folder, path)
    scheme, mark, rest = joined.partition("://")
    return f"{scheme}://{os.path.normpath(rest)}" if mark else os.path.normpath(joined)


def _walk(folder: str) -> list[str]:
    found = []
    for name in PathManager.ls(folder):
        path = os.path.join(folder, name)
        if name.lower().endswith(IMAGE_SUFFIXES):
            found.append(path)
        elif not name.lower().endswith(_NO_FOLDERS) and PathManager.isdir(path):
            found += _walk(path)
    return sorted(found)


def _read_list(path: str, config: YoloConfig) -> list[str]:
    """Read a list file; its lines are relative to its folder or to the roots of the dataset."""
    with PathManager.open(path, "rb") as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{config.file}: the list {path!r} is not UTF-8 text: {error}.") from error
    lines = [line.strip() for line in text.splitlines()]
    folders = [os.path.dirname(path), *config.roots]
    used = folders[0]
    found = []
    for line in filter(None, lines):
        if os.path.isabs(line) or is_remote(line):
            found.append(line)
            continue
        if not found or not PathManager.isfile(join_path(used, line)):
            matching = (folder for folder in folders if PathManager.isfile(join_path(folder, line)))
            used = next(matching, used)
        found.append(join_path(used, line))
    return found


def label_file_of(image: str) -> str:
    """Return the path of an image's labels: in `labels` instead of `images`, else next to the image."""
    stem = os.path.splitext(image)[0]
    head, folder, tail = f"/{stem}".rpartition("/images/")
    return f"{head}/labels/{tail}.txt"[1:] if folder else f"{stem}.txt"
