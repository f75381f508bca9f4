"""The report of a run: figures, tables and one page, made of what it left in its output folder.

python -m detlib.engine.report OUTPUT_DIR
"""

from .writer import make_report, write_report

__all__ = ["make_report", "write_report"]
