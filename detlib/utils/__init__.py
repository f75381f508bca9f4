"""General helpers that are independent of detection and of the other packages of detlib.

Import names from their module (``from detlib.utils.events import EventStorage``). The package itself is
empty, so that importing one module does not load the dependencies of another.
"""

__all__: list[str] = []
