"""Helpers that know nothing of detection; nothing here imports another detlib package.

Import what you need from its module (``from detlib.utils.events import EventStorage``): this package
itself stays empty so that no use pays for another's dependencies.
"""

__all__: list[str] = []
