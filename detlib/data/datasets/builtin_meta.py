"""Metadata of COCO, Cityscapes and ADE20K: classes, ids, colors, person keypoints."""

from __future__ import annotations

from typing import Any

from detlib.data.datasets.cityscapes_labels import CITYSCAPES_LABELS

__all__ = [
    "ADE20K_SEM_SEG_CATEGORIES",
    "CITYSCAPES_CATEGORIES",
    "COCO_CATEGORIES",
    "COCO_PERSON_KEYPOINT_FLIP_MAP",
    "COCO_PERSON_KEYPOINT_NAMES",
    "KEYPOINT_CONNECTION_RULES",
]

# Each entry has id, name and color. The ids have gaps.
_COCO_THINGS = """
1 person #dc143c, 2 bicycle #770b20, 3 car #00008e, 4 motorcycle #0000e6, 5 airplane #6a00e4,
6 bus #003c64, 7 train #005064, 8 truck #000046, 9 boat #0000c0, 10 traffic light #faaa1e,
11 fire hydrant #64aa1e, 13 stop sign #dcdc00, 14 parking meter #af74af, 15 bench #fa001e,
16 bird #a52a2a, 17 cat #ff4dff, 18 dog #00e2fc, 19 horse #b6b6ff, 20 sheep #005200, 21 cow #78a69d,
22 elephant #6e4c00, 23 bear #ae39ff, 24 zebra #c76400, 25 giraffe #480076, 27 backpack #ffb3f0,
28 umbrella #007d5c, 31 handbag #d10097, 32 tie #bcd0b6, 33 suitcase #00dcb0, 34 frisbee #ff63a4,
35 skis #5c0049, 36 snowboard #8581ff, 37 sports ball #4eb4ff, 38 kite #00e400, 39 baseball bat #aefff3,
40 baseball glove #2d59ff, 41 skateboard #868667, 42 surfboard #9194ae, 43 tennis racket #ffd0ba,
44 bottle #c5e2ff, 46 wine glass #ab8601, 47 cup #6d3f36, 48 fork #cf8aff, 49 knife #97005f,
50 spoon #09503d, 51 bowl #546933, 52 banana #4a4169, 53 apple #a6c466, 54 sandwich #d0c3d2,
55 orange #ff6d41, 56 broccoli #008f95, 57 carrot #b300c2, 58 hot dog #d1636a, 59 pizza #057900,
60 donut #e3ffcd, 61 cake #93bad0, 62 chair #994501, 63 couch #035fa1, 64 potted plant #a3ff00,
65 bed #7700aa, 67 dining table #00b6c7, 70 toilet #00a578, 72 tv #b78258, 73 laptop #5f2000,
74 mouse #827287, 75 remote #6e8185, 76 keyboard #a64a76, 77 cell phone #db8eb9, 78 microwave #4fd272,
79 oven #b25a3e, 80 toaster #41460f, 81 sink #7fa773, 82 refrigerator #3b696a, 84 book #8e6c2d,
85 clock #c4ac00, 86 vase #5f3650, 87 scissors #804cff, 88 teddy bear #c93901, 89 hair drier #f6007a,
90 toothbrush #bfa2d0
"""

_COCO_STUFF = """
92 banner #ffff80, 93 blanket #93d3cb, 95 bridge #966464, 100 cardboard #a8abac, 107 counter #9270c6,
109 curtain #d2aa64, 112 door-stuff #5c8859, 118 floor-wood #da58b8, 119 flower #f18100,
122 fruit #d911ff, 125 gravel #7c4ab5, 128 house #464646, 130 light #ffe4ff, 133 mirror-stuff #9ad000,
138 net #c1005c, 141 pillow #4c5b71, 144 platform #ffb4c3, 145 playingfield #6a9ab0, 147 railroad #e6968c,
148 river #3c8fff, 149 road #804080, 151 roof #5c5237, 154 sand #fed47c, 155 sea #494dae,
156 shelf #ffa062, 159 snow #ffffff, 161 stairs #68546d, 166 tent #a9a483, 168 towel #e1c7ff,
171 wall-brick #89364a, 175 wall-stone #879edf, 176 wall-tile #07f6e7, 177 wall-wood #6bffc8,
178 water-other #3a2995, 180 window-blind #b7798e, 181 window-other #ff4961, 184 tree-merged #6b8e23,
185 fence-merged #be9999, 186 ceiling-merged #928b8d, 187 sky-other-merged #4682b4,
188 cabinet-merged #86c79c, 189 table-merged #d1e28c, 190 floor-other-merged #60246c,
191 pavement-merged #606060, 192 mountain-merged #40aa40, 193 grass-merged #98fb98,
194 dirt-merged #d0e5e4, 195 paper-merged #cebaab, 196 food-other-merged #98a140,
197 building-other-merged #747000, 198 rock-merged #00728f, 199 wall-other-merged #66669c,
200 rug-merged #fa8dff
"""

# The 150 classes of the scene parsing challenge. A class may have several names, separated by commas.
_ADE20K = """
wall; building; sky; floor; tree; ceiling; road, route; bed; window; grass; cabinet; sidewalk, pavement;
person; earth, ground; door; table; mountain, mount; plant; curtain; chair; car; water; painting, picture;
sofa; shelf; house; sea; mirror; rug; field; armchair; seat; fence; desk; rock, stone; wardrobe, closet,
press; lamp; tub; rail; cushion; base, pedestal, stand; box; column, pillar; signboard, sign; chest of
drawers, chest, bureau, dresser; counter; sand; sink; skyscraper; fireplace; refrigerator, icebox;
grandstand, covered stand; path; stairs; runway; case, display case, showcase, vitrine; pool table, billiard
table, snooker table; pillow; screen door, screen; stairway, staircase; river; bridge, span; bookcase;
blind, screen; coffee table; toilet, can, commode, crapper, pot, potty, stool, throne; flower; book; hill;
bench; countertop; stove; palm, palm tree; kitchen island; computer; swivel chair; boat; bar; arcade
machine; hovel, hut, hutch, shack, shanty; bus; towel; light; truck; tower; chandelier; awning, sunshade,
sunblind; street lamp; booth; tv; plane; dirt track; clothes; pole; land, ground, soil; bannister, banister,
balustrade, balusters, handrail; escalator, moving staircase, moving stairway; ottoman, pouf, pouffe, puff,
hassock; bottle; buffet, counter, sideboard; poster, posting, placard, notice, bill, card; stage; van; ship;
fountain; conveyer belt, conveyor belt, conveyer, conveyor, transporter; canopy; washer, automatic washer,
washing machine; plaything, toy; pool; stool; barrel, cask; basket, handbasket; falls; tent; bag; minibike,
motorbike; cradle; oven; ball; food, solid food; step, stair; tank, storage tank; trade name; microwave;
pot; animal; bicycle; lake; dishwasher; screen; blanket, cover; sculpture; hood, exhaust hood; sconce; vase;
traffic light; tray; trash can; fan; pier; crt screen; plate; monitor; bulletin board; shower; radiator;
glass, drinking glass; clock; flag
"""


def _parse_categories(table: str, isthing: int) -> list[dict[str, Any]]:
    categories = []
    for entry in table.replace("\n", " ").split(","):
        category_id, *words, color = entry.split()
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        categories.append({"id": int(category_id), "name": " ".join(words), "isthing": isthing, "color": rgb})
    return categories


COCO_CATEGORIES = _parse_categories(_COCO_THINGS, 1) + _parse_categories(_COCO_STUFF, 0)

# In the order of the training ids.
CITYSCAPES_CATEGORIES = [
    {
        "id": label.id,
        "trainId": label.train_id,
        "name": label.name,
        "isthing": int(label.has_instances),
        "color": list(label.color),
    }
    for label in CITYSCAPES_LABELS
    if not label.ignored
]

# detectron2 has one name with a trailing space. It is kept, since names are compared.
ADE20K_SEM_SEG_CATEGORIES = [
    name + " " if name == "window" else name for name in _ADE20K.strip().replace("\n", " ").split("; ")
]

COCO_PERSON_KEYPOINT_NAMES = (
    "nose",
    *("left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)

COCO_PERSON_KEYPOINT_FLIP_MAP = tuple(
    (name, name.replace("left", "right")) for name in COCO_PERSON_KEYPOINT_NAMES if name.startswith("left")
)

# Pairs of keypoints that are connected by a line, and its color.
KEYPOINT_CONNECTION_RULES = (
    ("left_ear", "left_eye", (102, 204, 255)),
    ("right_ear", "right_eye", (51, 153, 255)),
    ("left_eye", "nose", (102, 0, 204)),
    ("nose", "right_eye", (51, 102, 255)),
    ("left_shoulder", "right_shoulder", (255, 128, 0)),
    ("left_shoulder", "left_elbow", (153, 255, 204)),
    ("right_shoulder", "right_elbow", (128, 229, 255)),
    ("left_elbow", "left_wrist", (153, 255, 153)),
    ("right_elbow", "right_wrist", (102, 255, 224)),
    ("left_hip", "right_hip", (255, 102, 0)),
    ("left_hip", "left_knee", (255, 255, 77)),
    ("right_hip", "right_knee", (153, 255, 204)),
    ("left_knee", "left_ankle", (191, 255, 128)),
    ("right_knee", "right_ankle", (255, 195, 77)),
)


def _things(things: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "thing_dataset_id_to_contiguous_id": {category["id"]: i for i, category in enumerate(things)},
        "thing_classes": [category["name"] for category in things],
        "thing_colors": [category["color"] for category in things],
    }


def _stuff() -> dict[str, Any]:
    """Return the metadata of label maps of stuff, in which class 0 stands for any thing."""
    stuff = [category for category in COCO_CATEGORIES if not category["isthing"]]
    names = [category["name"].replace("-other", "").replace("-merged", "") for category in stuff]
    return {
        "stuff_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(stuff, 1)} | {0: 0},
        "stuff_classes": ["things", *names],
        "stuff_colors": [[82, 18, 128], *(category["color"] for category in stuff)],
    }


def _cityscapes() -> dict[str, Any]:
    """Return things for instances, and all classes as stuff for label maps."""
    return {
        "thing_classes": [c["name"] for c in CITYSCAPES_CATEGORIES if c["isthing"]],
        "stuff_classes": [c["name"] for c in CITYSCAPES_CATEGORIES],
    }


def _cityscapes_panoptic() -> dict[str, Any]:
    """Return all classes in one list, by training id."""
    classes = [category["name"] for category in CITYSCAPES_CATEGORIES]
    colors = [category["color"] for category in CITYSCAPES_CATEGORIES]
    return {
        "thing_classes": classes,
        "thing_colors": colors,
        "stuff_classes": classes,
        "stuff_colors": colors,
        **{
            f"{kind}_dataset_id_to_contiguous_id": {
                c["id"]: c["trainId"] for c in CITYSCAPES_CATEGORIES if c["isthing"] == isthing
            }
            for kind, isthing in (("thing", 1), ("stuff", 0))
        },
    }


def _get_builtin_metadata(name: str) -> dict[str, Any]:
    """Return the metadata that built-in datasets share.

    Args:
        name: "coco", "coco_person", "coco_panoptic_standard" (all categories in one list),
            "coco_panoptic_separated" (things and stuff in two lists), "cityscapes", "cityscapes_panoptic" or
            "ade20k_sem_seg".

    Raises:
        KeyError: The name is unknown.
    """
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    if name == "coco":
        return _things(things)
    if name == "coco_panoptic_standard":
        classes = [category["name"] for category in COCO_CATEGORIES]
        colors = [category["color"] for category in COCO_CATEGORIES]
        ids = {category["id"]: i for i, category in enumerate(COCO_CATEGORIES)}
        return {
            "thing_classes": classes,
            "thing_colors": colors,
            "stuff_classes": classes,
            "stuff_colors": colors,
            "thing_dataset_id_to_contiguous_id": dict(list(ids.items())[: len(things)]),
            "stuff_dataset_id_to_contiguous_id": dict(list(ids.items())[len(things) :]),
        }
    if name == "coco_panoptic_separated":
        return _things(things) | _stuff()
    if name == "coco_person":
        return {
            "thing_classes": ["person"],
            "keypoint_names": COCO_PERSON_KEYPOINT_NAMES,
            "keypoint_flip_map": COCO_PERSON_KEYPOINT_FLIP_MAP,
            "keypoint_connection_rules": KEYPOINT_CONNECTION_RULES,
        }
    if name == "cityscapes":
        return _cityscapes()
    if name == "cityscapes_panoptic":
        return _cityscapes_panoptic()
    if name == "ade20k_sem_seg":
        return {"stuff_classes": list(ADE20K_SEM_SEG_CATEGORIES)}
    raise KeyError(
        f"There are no built-in metadata {name!r}, only 'coco', 'coco_person', 'coco_panoptic_standard', "
        "'coco_panoptic_separated', 'cityscapes', 'cityscapes_panoptic' and 'ade20k_sem_seg'."
    )
