"""Every import of the project runs down: from a room to one further below, never up, never in a circle."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest

from support import ROOT

PACKAGE = ROOT / "fastgrpo"

# What may be imported, from the top floor to the ground: a room imports those below its own line.
FLOORS = (
    "__main__",
    "train trainer evaluate sample export inspect estimate report shapes_lab",
    "validation training",
    "run",
    "assembly",
    "evaluation guard",
    "base_pictures",
    "rollout update",
    "engine",
    "costs",
    "grpo",
    "policy hooks",
    "rewards unet",
    "models prompts",
    "shapes settings",
    "kernels schedule",
    "system",
    "types _version",
)
FLOOR = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms.split()}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the project. kernels/ is linked into the package."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")]
    names = {file: file.relative_to(PACKAGE.parent).with_suffix("").parts for file in files}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): file for file, parts in names.items()}


MODULES = modules()


def imported(name: str) -> set[str]:
    """The project's modules that one of them imports, wherever in its code; for the type checker alone counts too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else node.module for module in inside}
    return found - {name}


def room(module: str) -> str:
    return module.split(".")[1]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Paths that end where they began, one for each place where the search comes back to where it is."""
    done: set[str] = set()
    found: list[list[str]] = []

    def follow(path: list[str]) -> None:
        for target in sorted(arrows[path[-1]]):
            if target in path:
                found.append([*path[path.index(target) :], target])
            elif target not in done:
                follow([*path, target])
        done.add(path[-1])

    for name in arrows:
        if name not in done:
            follow([name])
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {room(name) for name in MODULES if name != "fastgrpo"}
    assert rooms == set(FLOOR), "FLOORS names each module and package of fastgrpo/ once"


def test_no_import_runs_upwards() -> None:
    arrows = [(name, target) for name in MODULES if name != "fastgrpo" for target in imported(name)]
    upwards = [
        f"{name} imports {target}"
        for name, target in arrows
        if target != "fastgrpo" and room(name) != room(target) and FLOOR[room(name)] <= FLOOR[room(target)]
    ]
    assert not upwards


def test_no_import_runs_in_a_circle() -> None:
    found = circles({name: imported(name) for name in MODULES})
    assert not found, [" -> ".join(pair) for circle in found for pair in pairwise(circle)]


@pytest.mark.parametrize("arrows", [{"a": {"b"}, "b": {"a"}}, {"a": {"b"}, "b": {"c"}, "c": {"b"}}])
def test_a_circle_is_found(arrows: dict[str, set[str]]) -> None:
    assert circles(arrows)
