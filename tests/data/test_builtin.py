"""Names, paths and metadata of the built-in datasets, compared with detectron2's."""

import gzip
import json
from pathlib import Path

import pytest

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.data.datasets import builtin, builtin_meta
from detlib.utils.colormap import colormap

FACTS = json.loads(gzip.decompress(Path(__file__).with_name("builtin_facts.json.gz").read_bytes()))
if not hasattr(builtin, "register_all_lvis"):
    FACTS["datasets"] = {k: v for k, v in FACTS["datasets"].items() if not k.startswith("lvis")}
ROOT = builtin._root()
META = FACTS["metadata"]


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", sorted(FACTS["datasets"]))
def test_names_and_paths_equal_detectron2s(name):
    assert name in DatasetCatalog
    found = as_json(MetadataCatalog.get(name).as_dict())
    for key, value in FACTS["datasets"][name].items():
        want = value.replace("DATA_ROOT", ROOT) if isinstance(value, str) else value
        assert found[key] == want, key


def kind_of(name):
    """Return the name of the metadata of a dataset in the facts."""
    if name.startswith("keypoints_coco"):
        return "coco_person"
    if name.endswith(("_separated", "_stuffonly")):
        return "coco_panoptic_separated"
    if name.startswith("coco"):
        return "coco_panoptic_standard" if name.endswith("_panoptic") else "coco"
    if name.startswith("cityscapes"):
        return None if "panoptic" in name else "cityscapes"
    return "ade20k_sem_seg" if name.startswith("ade20k") else None


@pytest.mark.parametrize("name", sorted(n for n in FACTS["datasets"] if kind_of(n)))
def test_metadata_equal_detectron2s(name):
    found = as_json(MetadataCatalog.get(name).as_dict())
    for key, value in META[kind_of(name)].items():
        assert found[key] == value, key


def test_metadata_have_no_further_keys():
    for name, facts in FACTS["datasets"].items():
        if kind_of(name):
            legal = facts.keys() | META[kind_of(name)].keys()
            assert MetadataCatalog.get(name).as_dict().keys() <= legal, name


def test_order_of_contiguous_ids_equals_detectron2s():
    """Some programs rely on detectron2's order of ids."""
    for name in ("coco_2017_train", "coco_2017_train_panoptic", "coco_2017_train_panoptic_separated"):
        for key in ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"):
            want = META[kind_of(name)].get(key)
            if want is not None:
                assert list(as_json(MetadataCatalog.get(name).get(key))) == list(want)


def test_cityscapes_panoptic_metadata():
    categories = META["cityscapes_categories"]
    assert builtin_meta.CITYSCAPES_CATEGORIES == categories
    metadata = MetadataCatalog.get("cityscapes_fine_panoptic_val")
    for kind in ("thing", "stuff"):
        assert metadata.get(f"{kind}_classes") == [c["name"] for c in categories]
        assert metadata.get(f"{kind}_colors") == [c["color"] for c in categories]
    assert metadata.thing_dataset_id_to_contiguous_id == {
        c["id"]: c["trainId"] for c in categories if c["isthing"]
    }
    assert metadata.stuff_dataset_id_to_contiguous_id == {
        c["id"]: c["trainId"] for c in categories if not c["isthing"]
    }


def test_categories_and_colors_equal_detectron2s():
    assert as_json(builtin_meta.COCO_CATEGORIES) == META["coco_categories"]
    assert builtin_meta.ADE20K_SEM_SEG_CATEGORIES == META["ade20k_sem_seg"]["stuff_classes"]
    assert colormap(rgb=True, maximum=255).astype(int).tolist() == FACTS["colormap"]


@pytest.mark.parametrize(
    "name", ["cityscapes_fine_instance_seg_val", "cityscapes_fine_panoptic_val", "ade20k_sem_seg_train"]
)
def test_error_for_missing_data_names_folder_and_variable(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for act in (DatasetCatalog[name], DatasetCatalog[name].check):
        with pytest.raises(FileNotFoundError, match=f"{name}.*needs .*DETLIB_DATASETS"):
            act()


@pytest.mark.parametrize(
    "variables, want", [(("A", "B"), "A"), ((None, "B"), "B"), ((None, None), "datasets")]
)
def test_environment_variable_sets_the_root(variables, want, monkeypatch):
    for name, value in zip(("DETLIB_DATASETS", "DETECTRON2_DATASETS"), variables):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert builtin._root() == want
