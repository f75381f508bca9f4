"""The source files of the package, their imports, and the import graph."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "detlib").rglob("*.py"))


def place(path: Path) -> str:
    """Return the path of a file below `detlib/`, with forward slashes."""
    return path.relative_to(ROOT / "detlib").as_posix()


def package_of(path: Path) -> str | None:
    """Return the top-level package of a file; None for files directly in `detlib/`."""
    parts = path.relative_to(ROOT / "detlib").parts
    return parts[0] if len(parts) > 1 else None


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file; each file is parsed once."""
    return ast.parse(path.read_text())


def imports(path: Path):
    """Yield (line, absolute name, whether at module level) of every import; `from x import y` is x.y."""
    tree = parse(path)
    in_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    module = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(tree):
        top = id(node) not in in_functions
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: len(module) - node.level]) + "." if node.level else ""
            base += node.module or ""
            yield from ((node.lineno, f"{base.rstrip('.')}.{alias.name}", top) for alias in node.names)


def module_name(path: Path) -> str:
    """Return the dotted name of a file; a package's `__init__.py` has the name of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Return, for each module of the package, the modules it imports anywhere, even for type checkers only.

    A name that a package's `__init__.py` re-exports counts as imported from the file that defines it. An
    `__init__.py` itself has no edges, so that re-exports do not make cycles.
    """
    modules = {module_name(path): path for path in FILES}
    reexports: dict[str, dict[str, str]] = {}
    for name, path in modules.items():
        if path.name == "__init__.py":
            reexports[name] = {full.rpartition(".")[2]: full for _, full, _ in imports(path)}

    def defined_in(full: str, depth: int = 0) -> str:
        if full in modules and full not in reexports:
            return full
        package, _, name = full.rpartition(".")
        if name in reexports.get(package, {}) and reexports[package][name] != full and depth < 10:
            return defined_in(reexports[package][name], depth + 1)
        return full if full in modules else package

    return {
        name: set()
        if path.name == "__init__.py"
        else {target for _, full, _ in imports(path) if (target := defined_in(full)) in modules} - {name}
        for name, path in modules.items()
    }


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components with more than one module (Tarjan, 1972), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def importers() -> dict[str, set[Path]]:
    """Return, for each file of the package (by `place`), the files that import it under its own path.

    The package, tools, configs and benchmarks count; an `__init__.py` that re-exports a name does not.
    """
    users = [
        *FILES,
        *(path for part in ("tools", "configs", "benchmarks") for path in (ROOT / part).rglob("*.py")),
    ]
    by_name = {module_name(path): path for path in FILES}
    found: dict[str, set[Path]] = {place(path): set() for path in FILES}
    for user in users:
        if user.name == "__init__.py":
            continue
        for _, full, _ in imports(user):
            target = by_name.get(full) or by_name.get(full.rpartition(".")[0])
            if target is not None and target != user:
                found[place(target)].add(user)
    return found
