"""The public surface: what every public name promises."""

import doctest
import importlib
import inspect
import pkgutil
from enum import Enum

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp

# every room that is not private: what a new one exports is checked without a word here
NAMESPACES = ["jaxprune"] + [
    f"jaxprune.{info.name}"
    for info in pkgutil.iter_modules(jp.__path__)
    if not info.name.startswith("_")
]


def public():
    for name in NAMESPACES:
        module = importlib.import_module(name)
        for attribute in module.__all__:
            value = getattr(module, attribute)
            if not inspect.ismodule(value):
                yield f"{name}.{attribute}", value


PUBLIC = dict(public())
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}
# what needs no example: a command, and helpers of one line
PLAIN = ("main", "human_bytes", "disk_bytes")
# keyword-only does not suit these positional habits
POSITIONAL = {"bits", "scores", "stats", "where"}


def test_all_is_sorted():
    for name in NAMESPACES:
        names = importlib.import_module(name).__all__
        assert list(names) == sorted(names, key=lambda n: (not n.isupper(), n)), name


@pytest.mark.parametrize("name", PUBLIC)
def test_documented(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert text, name
    short = name.rsplit(".", 1)[1]
    value = PUBLIC[name]
    if inspect.isclass(value) and (
        "Attributes:" in text or getattr(value, "_is_protocol", False) or issubclass(value, Enum)
    ):
        return  # data that functions return, and what functions ask for
    assert ">>>" in text or short in PLAIN, f"{name}: no example"
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
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    found = doctest.testmod(module, extraglobs=names, optionflags=flags)
    assert found.failed == 0
