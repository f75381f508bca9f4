"""Report on a training run: figures, tables and an HTML page built from the run's output folder.

python -m detlib.report OUTPUT_DIR
"""

from detlib.report.writer import make_report, write_report

__all__ = ["make_report", "write_report"]
