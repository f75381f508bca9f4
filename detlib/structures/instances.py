"""`Instances`: the objects of one image, as fields of equal length."""

import itertools
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch

__all__ = ["Instances"]


class Instances:
    """The objects of one image, as named fields that all have one entry per object.

    Fields are read and written as attributes::

        instances = Instances((480, 640))
        instances.gt_boxes = Boxes(...)
        instances.set("gt_classes", torch.tensor([1, 3]))
        large = instances[instances.gt_boxes.area() > 1024]

    A field may be a tensor, a list, or a structure with `len()`, indexing and a `cat` class method such as
    Boxes. Names that begin with an underscore are ordinary attributes, not fields.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any):
        """Create the object.

        Args:
            image_size: (height, width) of the image that coordinates refer to.
            **kwargs: initial fields.
        """
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self._image_size

    def __setattr__(self, name: str, val: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, val)
        else:
            self.set(name, val)

    def __getattr__(self, name: str) -> Any:
        # Only called if ordinary lookup fails; `_fields` is absent while an object is being unpickled.
        fields = self.__dict__.get("_fields", {})
        if name not in fields:
            raise AttributeError(f"Instances have no field '{name}'. Fields: {_names(fields)}")
        return fields[name]

    def set(self, name: str, value: Any) -> None:
        """Add or replace the field `name`.

        Raises:
            ValueError: the number of entries differs from the other fields.
            AttributeError: `name` is an attribute or method of Instances, which would hide the field.
        """
        if hasattr(type(self), name):
            raise AttributeError(f"'{name}' cannot be a field, since Instances.{name} exists")
        others = [key for key in self._fields if key != name]
        if others and len(value) != len(self._fields[others[0]]):
            lengths = ", ".join(f"{key}: {len(self._fields[key])}" for key in others)
            raise ValueError(f"Field '{name}' has {len(value)} entries, other fields differ ({lengths})")
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """Return whether there is a field `name`."""
        return name in self._fields

    def remove(self, name: str) -> None:
        """Remove the field `name`; raise KeyError if there is none."""
        self.get(name)
        del self._fields[name]

    def get(self, name: str) -> Any:
        """Return the field `name`; raise KeyError if there is none."""
        if name not in self._fields:
            raise KeyError(f"Instances have no field '{name}'. Fields: {_names(self._fields)}")
        return self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """Return all fields by name. Changes of the dict change the object."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> "Instances":
        """Return the same objects after calling `to(*args, **kwargs)` on every field that has it."""
        moved = type(self)(self._image_size)
        for name, value in self._fields.items():
            moved._fields[name] = value.to(*args, **kwargs) if hasattr(value, "to") else value
        return moved

    def __getitem__(self, item: int | slice | torch.Tensor) -> "Instances":
        """Select objects by an index (giving one object), a slice, an integer vector or a boolean vector."""
        if isinstance(item, Integral):
            if not -len(self) <= item < len(self):
                raise IndexError(f"Index {item} is out of range for {len(self)} instances")
            item = slice(item, item + 1 or None)
        selected = type(self)(self._image_size)
        for name, value in self._fields.items():
            if isinstance(value, (list, tuple)) and not isinstance(item, slice):
                # Lists cannot be indexed with vectors.
                positions = torch.arange(len(value))[torch.as_tensor(item).cpu()].tolist()
                selected._fields[name] = type(value)(value[i] for i in positions)
            else:
                selected._fields[name] = value[item]
        return selected

    def __len__(self) -> int:
        """Return the number of objects; 0 if there is no field yet."""
        for value in self._fields.values():
            return len(value)
        return 0

    def __iter__(self) -> Iterator["Instances"]:
        """Yield each object as Instances of length 1."""
        return (self[i] for i in range(len(self)))

    @staticmethod
    def cat(instance_lists: list["Instances"]) -> "Instances":
        """Concatenate multiple Instances of the same image size.

        Args:
            instance_lists: at least one Instances, all with the same fields.

        Raises:
            ValueError: the list is empty, or image sizes or field names differ.
            TypeError: the type of a field cannot be concatenated.
        """
        for instances in instance_lists:
            if not isinstance(instances, Instances):
                raise TypeError(f"Instances.cat takes a list of Instances, got {type(instances).__name__}")
        if len(instance_lists) == 0:
            raise ValueError("Instances.cat needs at least one Instances")
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        for other in instance_lists[1:]:
            if other.image_size != first.image_size:
                raise ValueError(f"Image sizes differ: {first.image_size} and {other.image_size}")
            if other._fields.keys() != first._fields.keys():
                raise ValueError(f"Fields differ: {_names(first._fields)} and {_names(other._fields)}")
        joined = type(first)(first.image_size)
        for name in first._fields:
            values = [instances._fields[name] for instances in instance_lists]
            joined._fields[name] = _concatenate(name, values)
        return joined

    def __repr__(self) -> str:
        height_width = f"image_height={self._image_size[0]}, image_width={self._image_size[1]}"
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        return f"{type(self).__name__}(num_instances={len(self)}, {height_width}, fields=[{fields}])"


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(fields) or "none"


def _concatenate(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(values, dim=0)
    if isinstance(first, (list, tuple)):
        return type(first)(itertools.chain(*values))
    if hasattr(type(first), "cat"):
        return type(first).cat(values)
    raise TypeError(f"Field '{name}' of type {type(first).__name__} cannot be concatenated: it has no cat()")
