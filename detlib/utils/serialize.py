"""Pickling of objects that plain pickle does not support."""

import pickle
from typing import Any

__all__ = ["PicklableWrapper"]


def _unwrap(data: bytes) -> Any:
    return PicklableWrapper(pickle.loads(data))


class PicklableWrapper:
    """A wrapper that makes an object picklable, also a lambda or local function.

    Objects that plain pickle does not support need the package cloudpickle. Calls and attributes are
    forwarded to the wrapped object.
    """

    def __init__(self, obj: Any) -> None:
        while isinstance(obj, PicklableWrapper):  # do not nest wrappers
            obj = obj._obj
        self._obj: Any = obj

    def __reduce__(self):
        try:
            data = pickle.dumps(self._obj)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            try:
                import cloudpickle
            except ImportError:
                raise pickle.PicklingError(
                    f"{self._obj!r} cannot be sent to another process ({error}). Define it at the top level "
                    "of a module, or install cloudpickle."
                ) from error
            data = cloudpickle.dumps(self._obj)
        return _unwrap, (data,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_obj":  # not set yet while unpickling or copying
            raise AttributeError(name)
        return getattr(self._obj, name)
