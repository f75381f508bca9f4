"""Create the files that built-in datasets need in addition to the published ones.

    python tools/prepare_data.py ade20k [--root DIR] [--workers N] [--overwrite]
    python tools/prepare_data.py cityscapes | coco-stuff | lvis-cocofied

This is the same as ``python -m detlib.data.prepare``, which also works without a source checkout; see there.
"""

import sys

from detlib.data.prepare.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
