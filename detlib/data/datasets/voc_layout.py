"""Where the files of a dataset with VOC's XML are.

The layout of Pascal VOC, and those that labeling tools write:

DIR/ImageSets/Main/SPLIT.txt           one image name per line; without such lists all XML files are one split
DIR/Annotations/NAME.xml               or annotations, annots, labels, xml, or next to the images
DIR/JPEGImages/NAME.jpg                or images, imgs, img, or next to the XML
DIR/labels.txt                         optional: the classes in order, one per line
DIR/SPLIT/...                          one folder for each split, with any of the layouts above
DIR/annotations/SPLIT, DIR/images/SPLIT
"""

from __future__ import annotations

import logging
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from detlib.data.datasets.image_paths import split_path
from detlib.data.datasets.split_names import split_names
from detlib.utils.file_io import PathManager

__all__ = [
    "ALL",
    "IMAGE_SUFFIXES",
    "VocSplit",
    "find_voc_class_names",
    "find_voc_split",
    "list_voc_splits",
    "parse_xml",
    "read_lines",
]

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif")

ALL = "all"
"""Name of the split of all XML files, where there are no lists."""

_LISTS = ("ImageSets/Main", "ImageSets")
_XML_FOLDERS = ("annotations", "annotation", "annots", "labels", "label", "xml", "xmls")
_IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")

# The lists of one class that VOC has give each image a flag: whether it shows such an object.
_FLAGS = (["1"], ["-1"], ["0"])


@dataclass
class VocSplit:
    """The files of one split.

    Attributes:
        names: names of its images without suffix, as listed; a name may be listed twice.
        source: the list, or the folder of the XML files, for messages.
        xml_folder: folder of the XML files.
        image_folders: folders that images are searched in.
    """

    names: list[str]
    source: str
    xml_folder: str
    image_folders: tuple[str, ...]
    _images: dict[str, str] | None = field(default=None, repr=False)

    def xml_file(self, name: str) -> str:
        """Return the path of an image's XML file, which may not exist."""
        return os.path.join(self.xml_folder, f"{name}.xml")

    def image_file(self, name: str, root: ElementTree.Element | None = None) -> str | None:
        """Return the path of an image; None if there is none.

        Args:
            name: its name in the list, which is that of the XML file.
            root: the root of its XML, whose `filename` is tried too.
        """
        if self._images is None:
            self._images = {}
            for folder in self.image_folders:
                self._images = _images_in(folder) | self._images
        if name in self._images or root is None:
            return self._images.get(name)
        parts = split_path(root.findtext("filename") or "")
        return self._images.get(os.path.splitext(parts[-1])[0]) if parts else None


def _images_in(folder: str) -> dict[str, str]:
    """Return the paths of the images in a folder by name without suffix; .jpg is preferred."""
    found: dict[str, str] = {}
    for entry in sorted(PathManager.ls(folder)):
        stem, suffix = os.path.splitext(entry)
        if suffix.lower() == ".jpg" or (suffix.lower() in IMAGE_SUFFIXES and stem not in found):
            found[stem] = os.path.join(folder, entry)
    return found


def _folders_named(dirname: str, names: tuple[str, ...]) -> list[str]:
    """Return the folders in a folder that have one of these names in upper or lower case, in their order."""
    found = {entry.lower(): entry for entry in sorted(PathManager.ls(dirname), reverse=True)}
    paths = (os.path.join(dirname, found[name]) for name in names if name in found)
    return [path for path in paths if PathManager.isdir(path)]


def _xml_names(folder: str) -> list[str]:
    """Return the names of the annotation files in a folder, sorted, without suffix."""
    names = (name for name in PathManager.ls(folder) if name.endswith(".xml") and not name.startswith("._"))
    return sorted(name.removesuffix(".xml") for name in names)


def _is_voc_xml(path: str) -> bool:
    with PathManager.open(path, "rb") as file:
        head = file.read(4096)
    return b"<annotation>" in head or "<annotation>".encode("utf-16-le") in head or b"<annotation " in head


def _xml_folder(dirname: str) -> str | None:
    """Return the folder of the XML files of VOC in a folder; None if there are none."""
    for folder in [*_folders_named(dirname, _XML_FOLDERS), dirname]:
        names = _xml_names(folder)
        if names and _is_voc_xml(os.path.join(folder, f"{names[0]}.xml")):
            return folder
    return None


def _image_folders(dirname: str, xml_folder: str) -> tuple[str, ...]:
    return (*dict.fromkeys([*_folders_named(dirname, _IMAGE_FOLDERS), xml_folder, dirname]),)


def _list_folder(dirname: str) -> str | None:
    """Return the folder of the lists of splits; None if there is none."""
    for name in _LISTS:
        folder = os.path.join(dirname, *name.split("/"))
        if PathManager.isdir(folder) and any(entry.endswith(".txt") for entry in PathManager.ls(folder)):
            return folder
    return None


def _split_folders(dirname: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the folder of the XML files and the folders of the images of each split that is a folder."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name in sorted(PathManager.ls(dirname)):
        path = os.path.join(dirname, name)
        reserved = name.lower() in (*_XML_FOLDERS, *_IMAGE_FOLDERS, "imagesets")
        if not reserved and not os.path.splitext(name)[1] and PathManager.isdir(path):
            xml_folder = _xml_folder(path)
            if xml_folder is not None:
                found[name] = xml_folder, _image_folders(path, xml_folder)
    for parent in _folders_named(dirname, _XML_FOLDERS):
        for name in sorted(PathManager.ls(parent)):
            path = os.path.join(parent, name)
            if name not in found and not os.path.splitext(name)[1] and PathManager.isdir(path):
                images = (os.path.join(folder, name) for folder in _folders_named(dirname, _IMAGE_FOLDERS))
                if _xml_folder(path) == path:
                    found[name] = path, (*filter(PathManager.isdir, images), path)
    return found


def list_voc_splits(dirname: str) -> list[str]:
    """Return the names of the splits in a folder: lists, `ALL`, or folders; [] if there is no XML of VOC."""
    if _xml_folder(dirname) is None:
        return sorted(_split_folders(dirname))
    lists = _list_folder(dirname)
    if lists is None:
        return [ALL]
    return sorted(name.removesuffix(".txt") for name in PathManager.ls(lists) if name.endswith(".txt"))


def find_voc_split(dirname: str, split: str = "") -> VocSplit:
    """Find the files of a split.

    Args:
        dirname: folder of the dataset.
        split: name of a list, of a folder in `dirname`, or "all"; "" is the only split.

    Raises:
        FileNotFoundError: The folder, the split or its XML files do not exist; the message names the splits.
        ValueError: The list is empty, or a name is needed.
    """
    if not PathManager.isdir(dirname):
        raise FileNotFoundError(f"Folder {dirname!r} does not exist.")
    lists, xml_folder = _list_folder(dirname), _xml_folder(dirname)
    if lists is not None:
        return _listed_split(dirname, split, lists, xml_folder)
    if xml_folder is not None:
        if split not in ("", ALL):
            raise FileNotFoundError(
                f"{dirname!r} has neither a list ImageSets/Main/{split}.txt nor a folder {split!r} with XML "
                "files. Without lists, all XML files are read as one split: leave the name of the split out."
            )
        names = _xml_names(xml_folder)
        return VocSplit(names, xml_folder, xml_folder, _image_folders(dirname, xml_folder))
    splits = _split_folders(dirname)
    for name in split_names(split):
        if name in splits:
            folder, images = splits[name]
            return VocSplit(_xml_names(folder), folder, folder, images)
    if splits and not split:
        raise ValueError(f"{dirname!r} has the splits {', '.join(splits)}; specify which is meant.")
    if splits:
        raise FileNotFoundError(
            f"{dirname!r} has no folder {split!r} with XML files of VOC. It has the splits: "
            f"{', '.join(splits)}."
        )
    raise FileNotFoundError(_no_xml(dirname))


def _no_xml(dirname: str) -> str:
    return f"{dirname!r} has no XML files of VOC, here or in a folder {', '.join(_XML_FOLDERS)}."


def _listed_split(dirname: str, split: str, lists: str, xml_folder: str | None) -> VocSplit:
    path = os.path.join(lists, split + ".txt")
    if not split or not PathManager.isfile(path):
        splits = sorted(
            entry.removesuffix(".txt") for entry in PathManager.ls(lists) if entry.endswith(".txt")
        )
        listed = f"{lists!r} has the splits: {', '.join(splits)}."
        if not split:
            raise ValueError(f"{listed} Specify which is meant.")
        raise FileNotFoundError(f"{path!r} does not exist. {listed}")
    if xml_folder is None:
        raise FileNotFoundError(_no_xml(dirname))
    names = _read_names(path, xml_folder)
    if not names:
        raise ValueError(f"{path!r} lists no images.")
    return VocSplit(names, path, xml_folder, _image_folders(dirname, xml_folder))


def find_voc_class_names(dirname: str) -> list[str]:
    """Return the class names of a dataset.

    They are the lines of `DIR/labels.txt`, or without that file the sorted names of all objects of all
    splits.

    Raises:
        FileNotFoundError: There are no XML files.
        ValueError: No object has a name.
    """
    listed = os.path.join(dirname, "labels.txt")
    if PathManager.isfile(listed):
        lines = read_lines(listed)
        if len({*lines}) < len(lines):
            twice = [name for name, count in Counter(lines).items() if count > 1]
            logger.warning("%s lists %s more than once; each is one class.", listed, twice)
        if lines:
            return [*dict.fromkeys(lines)]
    own = _xml_folder(dirname)
    folders = [own] if own else [folder for folder, _ in _split_folders(dirname).values()]
    if not folders:
        raise FileNotFoundError(_no_xml(dirname))
    files = [os.path.join(folder, f"{name}.xml") for folder in folders for name in _xml_names(folder)]
    names: set[str] = set()
    with ThreadPoolExecutor(8) as pool:  # in an object store, most of the time is waiting
        for root in pool.map(parse_xml, files):
            names.update((element.findtext("name") or "").strip() for element in root.iter("object"))
    names.discard("")
    if not names:
        raise ValueError(f"No annotation in {', '.join(map(repr, folders))} has a named object.")
    return sorted(names)


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file, stripped, without empty lines.

    Raises:
        ValueError: The file is not UTF-8 text.
    """
    with PathManager.open(path, "rb") as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path!r} is not UTF-8 text: {error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_names(path: str, annotations: str) -> list[str]:
    """Return the image names of a list.

    A line is a name, or a name and a flag. Names may contain spaces. If the flag could be the end of the
    name, the files in the folder `annotations` decide.
    """
    lines = read_lines(path)
    existing: set[str] = set()
    if any(len(line.split()) > 1 for line in lines):
        existing = {name.removesuffix(".xml") for name in PathManager.ls(annotations)}
    words = [line.split() for line in lines]
    return [
        first if rest in _FLAGS and line not in existing else line
        for line, (first, *rest) in zip(lines, words)
    ]


def parse_xml(path: str) -> ElementTree.Element:
    """Return the root element of an annotation file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not XML, or has an unknown encoding.
    """
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"Annotation file {path!r} does not exist.")
    with PathManager.open(path, "rb") as file:
        content = file.read()
    try:
        return _parse(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"Annotation file {path!r} is not valid XML: {error}") from error


def _parse(content: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(content)
    except (ValueError, LookupError):
        # The parser has no multi-byte encodings except Unicode. Given decoded text, it needs none.
        declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.-]+)[\"']", content)
        if declared is None:
            raise
        return ElementTree.fromstring(content.decode(declared[1].decode("ascii")))
