"""URLs of published weights."""

import pytest

from detlib.checkpoint.catalog import ModelCatalog, ModelCatalogHandler, ModelZooHandler
from detlib.utils.download import DownloadError
from detlib.utils.file_io import PathManager

HOST = "https://dl.fbaipublicfiles.com"


def test_urls_of_names():
    zoo, catalog = ModelZooHandler(), ModelCatalogHandler()
    assert zoo.url("detectron2://a/b.pkl") == f"{HOST}/detectron2/a/b.pkl"
    backbone = "catalog://ImageNetPretrained/FAIR/R-50-GN"
    assert catalog.url(backbone) == f"{HOST}/detectron/ImageNetPretrained/47261647/R-50-GN.pkl"
    assert catalog.url("catalog://35857197/a.pkl") == f"{HOST}/detectron/35857197/a.pkl"
    with pytest.raises(KeyError, match="no backbone 'MSRA/R-52'.*'MSRA/R-50'"):
        ModelCatalog.get("ImageNetPretrained/MSRA/R-52")


def test_offline_error_has_url_and_path_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path))
    monkeypatch.setenv("DETLIB_OFFLINE", "1")
    url = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    path = tmp_path / "detectron2" / "ImageNetPretrained" / "MSRA" / "R-50.pkl"
    with pytest.raises(DownloadError, match=f"{HOST}/detectron2/ImageNetPretrained/MSRA/R-50.pkl.*{path}"):
        PathManager.get_local_path(url)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    assert PathManager.get_local_path(url) == str(path)
    with PathManager.open(url, "rb") as f:
        assert f.read() == b"weights"
