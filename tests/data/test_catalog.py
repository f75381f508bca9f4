"""Registering datasets and metadata, and errors for unknown names."""

import pickle

import numpy as np
import pytest

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.catalog import Metadata, check_datasets_exist


@pytest.fixture
def registered():
    """Register datasets for one test and remove them afterwards."""
    names = []

    def register(name, func, **kwargs):
        names.append(name)
        DatasetCatalog.register(name, func, **kwargs)

    yield register
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def test_register_get_list_remove(registered):
    calls = []
    registered("catalog_test_cells", lambda: calls.append(1) or [{"file_name": "a.png"}])
    assert "catalog_test_cells" in DatasetCatalog and "catalog_test_cells" in DatasetCatalog.list()
    assert calls == [], "registering must not load"
    assert DatasetCatalog.get("catalog_test_cells") == [{"file_name": "a.png"}]
    DatasetCatalog.remove("catalog_test_cells")
    assert "catalog_test_cells" not in DatasetCatalog


def test_registering_twice_needs_overwrite(registered):
    registered("catalog_test_twice", lambda: [1])
    with pytest.raises(ValueError, match="'catalog_test_twice' is already registered.*overwrite=True"):
        DatasetCatalog.register("catalog_test_twice", lambda: [2])
    DatasetCatalog.register("catalog_test_twice", lambda: [2], overwrite=True)
    assert DatasetCatalog.get("catalog_test_twice") == [2]


def test_register_refuses_what_is_not_callable():
    with pytest.raises(TypeError, match="not a list"):
        DatasetCatalog.register("catalog_test_list", [{}])


@pytest.mark.parametrize("use", [DatasetCatalog.get, DatasetCatalog.remove, check_datasets_exist])
def test_error_for_an_unknown_name_lists_similar_names(registered, use):
    registered("catalog_test_balloon_train", lambda: [])
    with pytest.raises(
        KeyError, match="'catalog_test_baloon_train' is not registered.*catalog_test_balloon_train"
    ):
        use("catalog_test_baloon_train")


def test_check_datasets_exist_accepts_a_string_and_loads_nothing(registered):
    registered("catalog_test_check", lambda: pytest.fail("was loaded"))
    check_datasets_exist("catalog_test_check")
    check_datasets_exist(("catalog_test_check",))
    check_datasets_exist(())
    with pytest.raises(KeyError, match="'catalog_test_nope'"):
        check_datasets_exist(["catalog_test_check", "catalog_test_nope"])


def test_metadata_can_be_set_only_once():
    metadata = MetadataCatalog.get("catalog_test_meta")
    try:
        assert MetadataCatalog.get("catalog_test_meta") is metadata
        assert metadata.set(thing_classes=["a", "b"]) is metadata
        metadata.thing_classes = ["a", "b"]
        with pytest.raises(
            ValueError, match=r"'thing_classes' of dataset 'catalog_test_meta'.*\['a', 'b'\].*\['c'\]"
        ):
            metadata.thing_classes = ["c"]
        with pytest.raises(ValueError, match="overwrite=True"):
            metadata.set(thing_classes=["c"])
        assert metadata.thing_classes == ["a", "b"]
        metadata.set(overwrite=True, thing_classes=["c"])
        assert metadata.thing_classes == ["c"]
    finally:
        MetadataCatalog.remove("catalog_test_meta")
    assert "catalog_test_meta" not in MetadataCatalog.list()
    with pytest.raises(KeyError, match="catalog_test_meta"):
        MetadataCatalog.remove("catalog_test_meta")


def test_error_for_a_missing_attribute_lists_the_others():
    metadata = Metadata(name="x", thing_classes=["a"])
    with pytest.raises(AttributeError, match="dataset 'x' has no 'thing_clases'.*thing_classes"):
        metadata.thing_clases  # noqa: B018
    assert metadata.get("nothing") is None and metadata.get("nothing", 3) == 3
    assert not hasattr(metadata, "stuff_classes")
    as_dict = metadata.as_dict()
    as_dict["thing_classes"] = None
    assert metadata.thing_classes == ["a"]
    assert pickle.loads(pickle.dumps(metadata)).as_dict() == metadata.as_dict()


def test_metadata_arrays_are_compared_by_content():
    metadata = Metadata(name="x", colors=np.arange(3))
    metadata.colors = np.arange(3)
    with pytest.raises(ValueError, match="'colors'"):
        metadata.colors = np.zeros(3)


def test_metadata_name_must_not_be_empty():
    with pytest.raises(ValueError, match="empty"):
        MetadataCatalog.get("")
