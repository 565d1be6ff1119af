"""The imports form the layered graph that the documentation draws."""

import ast
from pathlib import Path

import jaxprune

ROOT = Path(jaxprune.__file__).parent
LAYERS = {
    "_types": 0,
    "_uses": 0,
    "_trees": 0,
    "_bits": 0,
    "_leaves": 0,
    "_checks": 0,
    "_progress": 0,
    "_timing": 0,
    "schedules": 0,
    "scores": 1,
    "masks": 1,
    "quantize": 1,
    "share": 1,
    "sparse": 1,
    "program": 1,
    "budgets": 2,
    "graph": 2,
    "calibration": 3,
    "structure": 3,
    "optim": 3,
    "gates": 3,
    "runtime": 3,
    "distill": 4,
    "linen": 4,
    "nnx": 4,
    "qat": 4,
    "reconstruct": 4,
    "reports": 4,
    "rewrite": 4,
    "export": 5,
    "cli": 6,
}
# a room of the first layers may use these others of its own layer
SIBLINGS = {
    ("_trees", "_types"),
    ("_trees", "_uses"),
    ("_checks", "_trees"),
    ("_checks", "_types"),
    ("schedules", "_checks"),
}
ONLY = {
    "optax": {"optim", "cli"},
    "flax": {"cli", "linen", "nnx", "optim"},  # optim: packed masks under flax.serialization
    "orbax": {"export"},
    "matplotlib": {"reports"},
    "rich.progress": {"_progress", "cli"},
}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name


def room(file):
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def files():
    return [f for f in ROOT.rglob("*.py") if f != ROOT / "__init__.py"]


def test_every_room_has_a_layer():
    assert {room(f) for f in files()} == set(LAYERS)


def test_imports_go_down():
    for file in files():
        here = room(file)
        for name in imports(file):
            parts = name.split(".")
            if parts[0] != "jaxprune" or len(parts) < 2 or parts[1] not in LAYERS:
                continue
            there = parts[1]
            below = LAYERS[there] < LAYERS[here] or (here, there) in SIBLINGS
            assert there == here or below, f"{file} imports {name}"


def test_private_modules_stay_in_their_room():
    for file in files():
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "jaxprune" and len(parts) > 2 and parts[2].startswith("_"):
                assert parts[1] in (room(file), "cli"), f"{file} reaches into {name}"


def test_each_dependency_has_its_rooms():
    for file in files():
        for name in imports(file):
            parts = name.split(".")
            rooms = ONLY.get(parts[0]) or ONLY.get(".".join(parts[:2]))
            assert rooms is None or room(file) in rooms, f"{file} imports {name}"
            assert not name.startswith("jax._src"), f"{file} imports {name}"
