"""What a training run measures: the storage that collects it and the writers that put it out.

Code anywhere in a model calls ``get_event_storage().put_scalar(...)``; the trainer holds the storage
(``with EventStorage(start_iter) as storage``) and calls the writers now and then.
"""

from detlib.utils._event_storage import EventStorage, get_event_storage, has_event_storage
from detlib.utils.writers import (
    WRITERS,
    CommonMetricPrinter,
    CSVWriter,
    EventWriter,
    JSONWriter,
    MLflowWriter,
    TensorboardXWriter,
    WandbWriter,
)

__all__ = [
    "WRITERS",
    "CSVWriter",
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "MLflowWriter",
    "TensorboardXWriter",
    "WandbWriter",
    "get_event_storage",
    "has_event_storage",
]
