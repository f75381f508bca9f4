"""A small evaluator for the arithmetic in some published YAML configs.

It evaluates literals, arithmetic on numbers and list comprehensions over lists, and nothing else. Calls,
attributes and names other than comprehension variables are rejected, so a config file cannot run code.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

__all__ = ["evaluate"]

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}

_MAX_LENGTH = 2000  # characters
_MAX_STEPS = 10_000  # evaluated syntax nodes, counted once per iteration of a comprehension
_MAX_EXPONENT = 64
_MAX_VALUE = 1e30


class _Evaluator:
    def __init__(self) -> None:
        self.steps = 0

    def visit(self, node: ast.AST, names: dict[str, Any]) -> Any:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise ValueError(f"it takes more than {_MAX_STEPS} steps")
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return self.bounded(value)
            case ast.List(elts=elements):
                return [self.visit(element, names) for element in elements]
            case ast.Tuple(elts=elements):
                return tuple(self.visit(element, names) for element in elements)
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self.number(operand, names))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return self.arithmetic(type(op), self.number(left, names), self.number(right, names))
            case ast.ListComp(elt=element, generators=generators):
                return self.comprehension(element, generators, names)
        raise ValueError(f"{ast.unparse(node)!r} is not a literal, arithmetic or a list comprehension")

    def bounded(self, value: Any) -> Any:
        if isinstance(value, complex) or (isinstance(value, (int, float)) and not abs(value) <= _MAX_VALUE):
            raise ValueError("a number in it is out of bounds")
        return value

    def number(self, node: ast.AST, names: dict[str, Any]) -> int | float:
        value = self.visit(node, names)
        if type(value) not in (int, float):
            raise ValueError(f"{ast.unparse(node)!r} is not a number")
        return value

    def arithmetic(self, op: type[ast.operator], left: int | float, right: int | float) -> int | float:
        if op is ast.Pow and abs(right) > _MAX_EXPONENT:
            raise ValueError(f"its exponent {right} is larger than {_MAX_EXPONENT}")
        return self.bounded(_BINARY[op](left, right))

    def comprehension(
        self, element: ast.AST, generators: list[ast.comprehension], names: dict[str, Any]
    ) -> list:
        if not generators:
            return [self.visit(element, names)]
        first, *rest = generators
        source = self.visit(first.iter, names)
        if first.is_async or first.ifs or not isinstance(first.target, ast.Name):
            raise ValueError("its comprehension is not of the form '[... for name in list]'")
        if not isinstance(source, (list, tuple)):
            raise ValueError(f"{ast.unparse(first.iter)!r} is not a list")
        out = []
        for item in source:
            out += self.comprehension(element, rest, names | {first.target.id: item})
        return out


def evaluate(text: str) -> Any:
    """Return the value of an expression such as ``"[[x, x * 2**(1/3)] for x in [32, 64]]"``.

    Args:
        text: Python syntax, limited to literals, ``+ - * / // % **`` and list comprehensions.

    Raises:
        ValueError: if `text` is anything else, or its length or a number in it is out of bounds.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"The expression is longer than {_MAX_LENGTH} characters.")
    try:
        value = _Evaluator().visit(ast.parse(text.strip(), mode="eval").body, {})
        _check_size(value, {})
        return value
    except SyntaxError as error:
        raise ValueError(f"The expression {text!r} is not valid: {error.msg}.") from error
    except (RecursionError, MemoryError, ArithmeticError, ValueError) as error:
        raise ValueError(f"The expression {text!r} cannot be evaluated: {error}.") from error


def _check_size(value: Any, sizes: dict[int, int]) -> int:
    """Return the number of values in nested lists, where a shared list counts once per occurrence."""
    if not isinstance(value, (list, tuple)):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = 1 + sum(_check_size(item, sizes) for item in value)
        if sizes[id(value)] > _MAX_STEPS:
            raise ValueError(f"it has more than {_MAX_STEPS} values")
    return sizes[id(value)]
