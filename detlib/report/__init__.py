"""The report of a run: figures, tables and one page, made of what it left in its output folder.

python -m detlib.report OUTPUT_DIR
"""

from detlib.report.writer import make_report, write_report

__all__ = ["make_report", "write_report"]
