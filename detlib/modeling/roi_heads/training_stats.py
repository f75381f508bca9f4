"""Writing training figures to the event storage."""

import torch

from detlib.utils.events import get_event_storage

__all__ = ["put_scalars", "to_floats"]


def to_floats(*values: torch.Tensor) -> list[float]:
    """The numbers of scalar tensors, fetched from the device together: one wait instead of one each."""
    return torch.stack([value.detach().float() for value in values]).tolist()


def put_scalars(prefix: str, **values: float) -> None:
    """Write `prefix/name` for each value to the event storage that is in force."""
    storage = get_event_storage()
    for name, value in values.items():
        storage.put_scalar(f"{prefix}/{name}", value)
