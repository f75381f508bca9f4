"""`dir:` names the formats that it recognizes but does not read, and says what to do."""

import json

import pytest

from detlib.data import DatasetCatalog
from detlib.data.formats.recognized import RECOGNIZED, recognize
from tests.data.small_datasets import write

TASK = {"data": {"image": "a.jpg"}, "annotations": [{"result": [{"from_name": "label", "to_name": "image"}]}]}
SEGMENTS = {"images": [], "annotations": [{"segments_info": [], "file_name": "a.png", "image_id": 1}]}
FILES = {
    "COCO panoptic": {"annotations/panoptic_train.json": json.dumps(SEGMENTS)},
    "Label Studio": {"export.json": json.dumps([TASK])},
    "CreateML": {"train/_annotations.createml.json": "[]"},
    "Supervisely": {"meta.json": '{"classes": []}', "ds0/ann/a.jpg.json": "{}"},
    "VoTT": {"vott-json-export/birds-export.json": "{}"},
    "Datumaro": {"annotations/default.json": '{"infos": {}, "categories": {"label": {}}, "items": []}'},
    "KITTI": {"training/label_2/000001.txt": "Car 0 0 0 1 2 3 4 1 1 1 1 1 1 0"},
    "WIDER FACE": {"wider_face_split/wider_face_train_bbx_gt.txt": "a.jpg\n0\n"},
    "CrowdHuman": {"annotation_train.odgt": "{}"},
}


def test_every_recognized_format_has_a_case():
    assert [known.name for known in RECOGNIZED] == [*FILES]


@pytest.mark.parametrize("name", FILES)
def test_recognized_formats_are_named_with_what_to_do(tmp_path, name):
    for file, content in FILES[name].items():
        write(f"{tmp_path}/{file}", content)
    (known,) = (known for known in RECOGNIZED if known.name == name)
    with pytest.raises(FileNotFoundError, match=f"looks like {name}") as error:
        DatasetCatalog.get(f"dir:{tmp_path}")
    assert known.advice in str(error.value)
    assert str(error.value).count("looks like") == 1


def test_other_folders_are_not_recognized(tmp_path):
    write(f"{tmp_path}/notes.json", '{"a": 1}')
    write(f"{tmp_path}/images/a.txt", "1")
    assert recognize(str(tmp_path)) == ""
