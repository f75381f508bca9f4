"""Reading of plain YAML with bounded work, and errors that name the file, line and column."""

import re
from typing import Any

import yaml

__all__ = ["PlainLoader", "load_plain_yaml"]

# A text may use aliases (*name) as long as it expands to this many values, or to a few times its own.
_MAX_VALUES = 100_000
_MAX_EXPANSION = 10
_MAX_DIGITS = 1000
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class PlainLoader(yaml.SafeLoader):
    """A loader of plain data. Values that cannot be converted are errors with a line number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > _MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} digits is out of bounds", node.start_mark
            )
        try:
            return super().construct_object(node, deep=deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # the constructors raise ValueError, KeyError, AttributeError ...
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r} is not a valid {kind} ({error})", node.start_mark
            ) from error


# YAML 1.1 reads 1e-3 as a string, since it has no decimal point. Read it as a number.
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_plain_yaml(
    text: str | bytes, name: str = "<string>", loader_class: type[PlainLoader] = PlainLoader
) -> Any:
    """Parse one YAML document.

    Args:
        text: the YAML; bytes in UTF-8, or in UTF-16 with a byte order mark.
        name: name of the source, for messages.
        loader_class: a loader with additional tags.

    Returns:
        Dicts, lists and scalars; None for an empty text. Values with aliases are shared.

    Raises:
        ValueError: if `text` is not valid YAML, has an anchor inside itself, or aliases that expand to far
            more values than it has.
    """
    loader = None
    try:
        loader = loader_class(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None
        _check_aliases(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{name}{place}: {error.problem or error.context}.") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{name}: {_unreadable(error)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name}: this is not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _unreadable(error: yaml.reader.ReaderError) -> str:
    if error.encoding == "unicode":
        return f"this is not YAML: the character {chr(error.character)!r} at position {error.position}."
    return (
        f"this is not {error.encoding} text: byte 0x{error.character:02x} at position {error.position} "
        f"({error.reason})."
    )


def _check_aliases(root: yaml.Node) -> None:
    """Raise if a node has itself below it, or if aliases expand to too many values."""
    sizes: dict[int, int] = {}  # id of a node -> number of values in it, aliases expanded
    active: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        children = _children(node)
        if is_done:
            active.discard(id(node))
            sizes[id(node)] = min(1 + sum(sizes[id(child)] for child in children), 1 << 60)
        elif id(node) in active:
            raise yaml.constructor.ConstructorError(
                None, None, "the value of this anchor has the anchor itself in it", node.start_mark
            )
        elif id(node) not in sizes:
            active.add(id(node))
            stack.append((node, True))
            stack += [(child, False) for child in children]
    if sizes[id(root)] > max(_MAX_VALUES, _MAX_EXPANSION * len(sizes)):
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"the aliases would expand its {len(sizes)} values to {sizes[id(root)]}",
            root.start_mark,
        )


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
