"""The URLs ``detectron2://...`` and ``catalog://...`` of published weights.

``detectron2://NAME`` is a file of the model zoo, ``catalog://ImageNetPretrained/NAME`` a backbone pretrained
on ImageNet, and any other ``catalog://NAME`` a file of Detectron's model zoo. Importing this module registers
the URLs with `detlib.utils.file_io.PathManager`.
"""

from detlib.utils.file_io import CachedURLHandler, PathManager
from detlib.utils.suggest import suggest

__all__ = ["DETECTRON2_PREFIX", "ModelCatalog", "ModelCatalogHandler", "ModelZooHandler"]

_HOST = "https://dl.fbaipublicfiles.com/"
DETECTRON2_PREFIX = f"{_HOST}detectron2/"


class ModelCatalog:
    """The names of published backbones and models, and their URLs."""

    PREFIX = f"{_HOST}detectron/"
    IMAGENET_MODELS = {
        "MSRA/R-50": "ImageNetPretrained/MSRA/R-50.pkl",
        "MSRA/R-101": "ImageNetPretrained/MSRA/R-101.pkl",
        "FAIR/R-50-GN": "ImageNetPretrained/47261647/R-50-GN.pkl",
        "FAIR/R-101-GN": "ImageNetPretrained/47592356/R-101-GN.pkl",
        "FAIR/X-101-32x8d": "ImageNetPretrained/20171220/X-101-32x8d.pkl",
        "FAIR/X-101-64x4d": "ImageNetPretrained/FBResNeXt/X-101-64x4d.pkl",
        "FAIR/X-152-32x8d-IN5k": "ImageNetPretrained/25093814/X-152-32x8d-IN5k.pkl",
    }

    @classmethod
    def get(cls, name: str) -> str:
        """Return the URL of a name: ``ImageNetPretrained/MSRA/R-50``, or a path in Detectron's model zoo.

        Raises:
            KeyError: if there is no such backbone. The message lists similar names.
        """
        backbone = name.removeprefix("ImageNetPretrained/")
        if backbone == name:
            return cls.PREFIX + name
        if backbone in cls.IMAGENET_MODELS:
            return cls.PREFIX + cls.IMAGENET_MODELS[backbone]
        near = (
            suggest(backbone, cls.IMAGENET_MODELS) or f" Known backbones: {', '.join(cls.IMAGENET_MODELS)}."
        )
        raise KeyError(f"catalog://{name}: there is no backbone '{backbone}'.{near}")


class ModelCatalogHandler(CachedURLHandler):
    """A handler of ``catalog://`` URLs; see `ModelCatalog`."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["catalog://"]

    def url(self, path: str) -> str:
        return ModelCatalog.get(path.removeprefix("catalog://"))


class ModelZooHandler(CachedURLHandler):
    """A handler of ``detectron2://`` URLs, the files of the published model zoo."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["detectron2://"]

    def url(self, path: str) -> str:
        return DETECTRON2_PREFIX + path.removeprefix("detectron2://")


PathManager.register_handler(ModelCatalogHandler())
PathManager.register_handler(ModelZooHandler())
