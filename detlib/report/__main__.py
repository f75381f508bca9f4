"""Write the report of a training run that has finished, was killed, or is still running.

python -m detlib.report OUTPUT_DIR
"""

import argparse
import logging
import sys

from detlib.report.report import reason_of
from detlib.report.writer import make_report
from detlib.utils.logger import setup_logger


def main(argv: list[str] | None = None) -> int:
    """Write the report and return the exit status: 0, or 2 if no report was written."""
    parser = argparse.ArgumentParser(prog="python -m detlib.report", description=__doc__)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="output folder of a training run")
    arguments = parser.parse_args(argv)
    if not logging.getLogger("detlib").handlers:
        setup_logger()
    try:
        print(make_report(arguments.output_dir))
    except (KeyError, OSError, ValueError) as error:
        print(f"{parser.prog}: error: {reason_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
