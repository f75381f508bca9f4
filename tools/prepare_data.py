"""Makes the files that built-in data sets need and that nobody publishes.

    python tools/prepare_data.py ade20k [--root DIR] [--workers N] [--overwrite]
    python tools/prepare_data.py cityscapes | coco-stuff | lvis-cocofied

It is the same as ``python -m detlib.data.prepare``, which needs no copy of the sources; see there.
"""

import sys

from detlib.data.prepare.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
