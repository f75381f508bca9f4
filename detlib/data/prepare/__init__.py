"""Files of built-in datasets that are not published, derived from the downloads.

From a shell: `python -m detlib.data.prepare COMMAND`.
"""

from detlib.data.prepare.cityscapes import prepare_cityscapes
from detlib.data.prepare.label_maps import prepare_ade20k, prepare_coco_stuff
from detlib.data.prepare.lvis import prepare_lvis_cocofied

__all__ = ["prepare_ade20k", "prepare_cityscapes", "prepare_coco_stuff", "prepare_lvis_cocofied"]
