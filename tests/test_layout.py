"""Rules for the layout of the product's code: no import cycle, unique class names, small files and functions."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lakehouse", "pipelines", "ml", "serve", "app")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 60
EXCEPTIONS: dict[str, str] = {}
"""'path' or 'path:function' -> why it may be longer."""


def sources() -> Iterator[tuple[str, str]]:
    """Yield every Python file of the product: its path below the repository, and its text."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), file.read_text()


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions and for type checking count too."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        # graphlib lists each module before the one that imports it
        raise AssertionError(f"Import cycle: {' -> '.join(reversed(error.args[1]))}") from None


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_files_and_functions_are_short() -> None:
    long: dict[str, int] = {}
    for path, text in sources():
        long[path] = len(text.splitlines()) if len(text.splitlines()) > MAX_FILE_LINES else 0
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                long[f"{path}:{node.name}"] = lines if lines > MAX_FUNCTION_LINES else 0
    assert {place: lines for place, lines in long.items() if lines and place not in EXCEPTIONS} == {}
    assert [place for place in EXCEPTIONS if not long.get(place)] == [], "no longer needed"
