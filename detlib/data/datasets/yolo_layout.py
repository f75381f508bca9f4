"""Layouts of YOLO datasets: what the images of each split are, and the classes.

Ultralytics (https://docs.ultralytics.com/datasets/detect/)
    data.yaml           path: ROOT; train, val, test: a folder, a list file, or a list of these; names, nc;
                        for poses kpt_shape, and flip_idx if left and right differ
Darknet (https://github.com/AlexeyAB/darknet), CVAT
    obj.data            lines such as `names = obj.names` and `train = train.txt`, a list of images
labelImg, Label Studio
    classes.txt         one class a line; images here or in `images`
Roboflow's Darknet
    SPLIT/_darknet.labels   one class a line; images next to it

`yolo_labels` finds the label file of an image.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import yaml

from detlib.data.datasets.image_paths import ImageFinder
from detlib.data.datasets.split_names import split_names
from detlib.utils.file_io import PathManager, is_remote
from detlib.utils.safe_yaml import load_plain_yaml
from detlib.utils.suggest import suggest

__all__ = [
    "IMAGE_SUFFIXES",
    "YoloConfig",
    "find_yolo_images",
    "join_path",
    "read_yolo_config",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".mpo", ".dng", ".pfm")

# Suffixes of other files. Testing whether each is a folder would be slow in an object store.
_NO_FOLDERS = (".txt", ".json", ".xml", ".cache", ".npy")

_SPLITS = ("train", "val", "test")
_OTHER_NAMES = ("valid", "validation", "train2017", "val2017", "test2017")
_MAX_CLASSES = 100_000
_MAX_KEYPOINTS = 1000
_MAX_DESCRIPTION = 2**26  # bytes of a data.yaml or a list of classes


@dataclass(frozen=True)
class YoloConfig:
    """The content of a data.yaml.

    Attributes:
        file: path of the data.yaml or obj.data, or the folder.
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
        for name in split_names(split):
            if name in self.splits:
                return name
        existing = ", ".join(self.splits) or "none"
        raise ValueError(
            f"{self.file}: there is no split {split!r}, only: {existing}.{suggest(split, self.splits)}"
        )


def read_yolo_config(path: str) -> YoloConfig:
    """Read the description of a dataset.

    Args:
        path: a data.yaml, an obj.data of Darknet, or the folder of one of the layouts above.

    Raises:
        FileNotFoundError: There is no description.
        ValueError: It is malformed, or a key is missing or invalid; the message names the key.
    """
    if PathManager.isdir(path):
        return _read_folder(path)
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"Dataset file {path!r} does not exist.")
    return _read_darknet(path) if path.endswith(".data") else _read_yaml(path)


def _read_text(path: str) -> str:
    with PathManager.open(path, "rb") as file:
        data = file.read(_MAX_DESCRIPTION + 1)
    if len(data) > _MAX_DESCRIPTION:
        raise ValueError(f"Dataset file {path!r} has more than {_MAX_DESCRIPTION} bytes.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Dataset file {path!r} is not UTF-8 text: {error}.") from error


def _read_yaml(yaml_file: str) -> YoloConfig:
    text = _read_text(yaml_file)
    try:
        data = load_plain_yaml(text, os.path.basename(yaml_file))
    except ValueError as error:
        raise ValueError(f"Dataset file {yaml_file!r} is not valid YAML: {error}") from error
    if isinstance(data, dict) and "names" in data:
        # As they are written: "yes" and "007" are names, not a boolean and a number.
        data["names"] = yaml.load(text, Loader=yaml.BaseLoader).get("names", data["names"])
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


def _read_darknet(data_file: str) -> YoloConfig:
    folder = os.path.dirname(data_file)
    values = {}
    for line in _read_text(data_file).splitlines():
        key, mark, value = line.partition("=")
        if mark:
            values[key.strip()] = value.strip()
    names_file = ImageFinder(folder).find(values.get("names", ""))
    if names_file is None:
        raise ValueError(
            f"{data_file}: 'names' must be a file of class names, one a line; got {values.get('names')!r}."
        )
    splits = {
        ("val" if key == "valid" else key): values[key] for key in ("train", "valid", "test") if key in values
    }
    lists = {split: ImageFinder(folder).find(stated) for split, stated in splits.items()}
    # CVAT names lists that it does not write.
    found = {split: [path] for split, path in lists.items() if path is not None}
    if not found:
        raise ValueError(f"{data_file}: none of the lists of images exists: {splits}.")
    return YoloConfig(data_file, (folder,), _name_lines(names_file), found)


def _read_folder(folder: str) -> YoloConfig:
    for name in ("data.yaml", "data.yml", "obj.data"):
        path = os.path.join(folder, name)
        if PathManager.isfile(path):
            return read_yolo_config(path)
    splits = {}
    names_file = os.path.join(folder, "classes.txt")
    for name in sorted(PathManager.ls(folder)):
        path = os.path.join(folder, name, "_darknet.labels")
        if PathManager.isfile(path):
            splits[name] = [os.path.join(folder, name)]
            names_file = path
    if PathManager.isfile(os.path.join(folder, "_darknet.labels")):
        splits, names_file = {"all": [folder]}, os.path.join(folder, "_darknet.labels")
    if not PathManager.isfile(names_file):
        raise FileNotFoundError(
            f"{folder!r} has no data.yaml, obj.data, classes.txt or _darknet.labels, which name the classes."
        )
    if not splits:
        images = os.path.join(folder, "images")
        images = images if PathManager.isdir(images) else folder
        folders = [name for name in sorted(PathManager.ls(images)) if name in (*_SPLITS, *_OTHER_NAMES)]
        splits = {name: [os.path.join(images, name)] for name in folders} or {"all": [images]}
    return YoloConfig(folder, (folder,), _name_lines(names_file), splits)


def _name_lines(path: str) -> list[str]:
    names = [line.strip() for line in _read_text(path).splitlines()]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise ValueError(f"{path!r} must have one class name a line; it has an empty line, or none.")
    return names


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
        numbers = {
            int(key): name for key, name in names.items() if str(key).isdecimal() and len(str(key)) < 8
        }
        if sorted(numbers) != [*range(len(names))]:
            shown = ", ".join(map(str, [*names][:20]))
            raise ValueError(f"{yaml_file}: the keys of 'names' must be 0 to {len(names) - 1}, not {shown}.")
        names = [numbers[i] for i in range(len(names))]
    count = data.get("nc")
    if names is None and isinstance(count, int):
        if not 0 < count <= _MAX_CLASSES:
            raise ValueError(f"{yaml_file}: 'nc' must be from 1 to {_MAX_CLASSES}, got {str(count)[:50]}.")
        names = [f"class{i}" for i in range(count)]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{yaml_file}: 'names' must list the classes, got {_shorten(names)}.")
    if count is not None and count != len(names):
        raise ValueError(f"{yaml_file}: 'nc' is {_shorten(count)}, but 'names' has {len(names)} classes.")
    return names


def _shorten(value: Any) -> str:
    """Return the text of a value of a file, without following aliases of collections."""
    return f"a {type(value).__name__}" if isinstance(value, list | dict) and value else repr(value)[:100]


def _splits(data: dict, yaml_file: str) -> dict[str, list[str]]:
    splits = {}
    for key in dict.fromkeys((*_SPLITS, *split_names("val"))):
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
    if not valid or not 0 < shape[0] <= _MAX_KEYPOINTS or shape[1] not in (2, 3):
        raise ValueError(
            f"{yaml_file}: 'kpt_shape' must be [number of keypoints, 2 or 3 values for each], got "
            f"{str(shape)[:100]}."
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
        if name.startswith("._"):  # written by macOS next to each file
            continue
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
    finders = [ImageFinder(folder) for folder in dict.fromkeys(folders)]
    found = []
    for line in filter(None, lines):
        stated = line if os.path.isabs(line) else join_path(used, line)
        if is_remote(line):
            stated = line
        elif not PathManager.isfile(stated):
            known = [(finder.find(line), finder.root) for finder in finders]
            stated, used = next(((p, root) for p, root in known if p is not None), (stated, used))
        found.append(stated)
    return found
