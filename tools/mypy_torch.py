"""A mypy plugin that gives undeclared attributes of modules, biases and ShapeSpec fields the type Any.

In torch, the return type of `nn.Module.__getattr__` is `Tensor | Module`, and the bias of a layer has the
type `Tensor | None`. Without the plugin, every use of a bias or of an undeclared buffer would need a cast.
Declared attributes keep their types.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Instance, Type, TypeOfAny, UnionType, get_proper_type

_UNDECLARED = {"torch._tensor.Tensor", "torch.nn.modules.module.Module"}


def _any_if_undeclared(context: AttributeContext) -> Type:
    kind = get_proper_type(context.default_attr_type)
    if isinstance(kind, UnionType):
        parts = [get_proper_type(part) for part in kind.items]
        if {part.type.fullname for part in parts if isinstance(part, Instance)} == _UNDECLARED:
            return AnyType(TypeOfAny.special_form)
    return kind


def _any(context: AttributeContext) -> Type:
    return AnyType(TypeOfAny.special_form)


class TorchPlugin(Plugin):
    """The plugin; see the docstring of this module."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        # Modules do not check that the fields of a ShapeSpec that they need are set.
        if fullname.endswith(".bias") or fullname.startswith("detlib.layers.shape_spec.ShapeSpec."):
            return _any
        return _any_if_undeclared


def plugin(version: str) -> type[Plugin]:
    """Return the plugin class. mypy calls this function."""
    return TorchPlugin
