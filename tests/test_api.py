"""The public surface: what every public name promises."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp

NAMESPACES = ["jaxprune"] + [
    f"jaxprune.{name}"
    for name in (
        "scores",
        "budgets",
        "masks",
        "optim",
        "quantize",
        "schedules",
        "export",
        "reports",
        "share",
        "distill",
        "gates",
        "linen",
        "nnx",
    )
]


def public():
    for name in NAMESPACES:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", None) or [
            n for n, x in vars(module).items() if inspect.isfunction(x) and not n.startswith("_")
        ]
        for attribute in names:
            value = getattr(module, attribute)
            if not inspect.ismodule(value):
                yield f"{name}.{attribute}", value


PUBLIC = dict(public())
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}
# plain data that other functions return; their attributes are documented
DATA = {
    "Baseline",
    "CRDState",
    "ClusteredState",
    "GatedFunction",
    "GradualState",
    "Inspection",
    "MaskedState",
    "PhasedState",
    "PackedMask",
    "Pattern",
    "Report",
    "Projector",
    "Row",
    "Seen",
    "Similarity",
    "Site",
}
# keyword-only does not suit these positional habits
POSITIONAL = {"bits", "stats", "where"}


def test_all_is_sorted():
    for name in NAMESPACES:
        names = getattr(importlib.import_module(name), "__all__", [])
        assert list(names) == sorted(names, key=lambda n: (not n.isupper(), n)), name


@pytest.mark.parametrize("name", PUBLIC)
def test_documented(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert text, name
    if name.rsplit(".", 1)[1] in DATA or name == "jaxprune.reports.seconds":
        return
    if name.rsplit(".", 1)[1] not in ("human_bytes", "disk_bytes"):
        assert ">>>" in text, f"{name}: no example"
    if name in FUNCTIONS and len(inspect.signature(FUNCTIONS[name]).parameters) > 1:
        assert "Args:" in text, name
        assert "Returns:" in text, name
        for parameter in inspect.signature(FUNCTIONS[name]).parameters:
            assert parameter in text, f"{name}: {parameter} is not documented"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defaults_are_keyword_only(name):
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        if parameter.default is not parameter.empty and parameter.name not in POSITIONAL:
            assert parameter.kind is parameter.KEYWORD_ONLY, f"{name}({parameter.name})"


def modules():
    for info in pkgutil.walk_packages(jp.__path__, "jaxprune."):
        if "__main__" not in info.name:
            yield info.name


@pytest.mark.parametrize("name", ["jaxprune", *modules()])
def test_doctests(name):
    module = importlib.import_module(name)
    names = {"jp": jp, "jax": jax, "jnp": jnp, "optax": optax}
    found = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0
