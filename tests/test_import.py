"""`import jaxprune` is quick: what it loads besides `jax`, `flax` and `optax` is itself."""

import subprocess
import sys

import pytest

import jaxprune as jp

CODE = """
import sys
import jax, flax, optax
before = set(sys.modules)
import jaxprune
print(*sorted(set(sys.modules) - before))
"""
# what nobody waits for; what is slow is imported by the function that needs it
QUICK = {"jaxprune", "jaxtyping", "rich", "numpy", "mmap", "statistics", "_statistics"}
WHEN_USED = [
    "budgets",
    "calibration",
    "distill",
    "export",
    "gates",
    "linen",
    "nnx",
    "optim",
    "qat",
    "reconstruct",
    "reports",
    "rewrite",
]


def test_import_loads_little():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    new = run.stdout.split()
    assert {name.split(".")[0] for name in new} <= QUICK
    assert not [name for name in new if name.startswith(tuple(f"jaxprune.{n}" for n in WHEN_USED))]
    assert len(new) < 160  # each module of ours costs about a millisecond


@pytest.mark.parametrize("name", WHEN_USED)
def test_namespaces_that_load_when_used(name):
    assert name in dir(jp)
    assert getattr(jp, name).__name__ == f"jaxprune.{name}"


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="'jaxprune' has no attribute 'prunes'"):
        jp.prunes
