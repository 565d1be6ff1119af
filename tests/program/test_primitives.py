"""One table of primitives, and nobody else lists their names."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.graph import RULES
from jaxprune.program import PRIMITIVES, Flow, Kind, primitive, root, trace_program

RULED = ("couple", "counted", "evaluate", "nested", "indexing", "mixing", "routing")
ROOT = Path(jaxprune.__file__).parent
# where a primitive's name stands beside what is done about it: one function for each
TABLES = {"program/_primitives.py"} | {f"graph/_{name}.py" for name in RULED}


def names_in(node):
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [x.value for x in node.elts if isinstance(x, ast.Constant)]
    return []


def test_no_other_lists():
    """No module but those with rules lists three primitives or more."""
    for file in ROOT.rglob("*.py"):
        path = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text())):
            known = [x for x in names_in(node) if isinstance(x, str) and x in PRIMITIVES]
            assert len(known) < 3 or path in TABLES, f"{path}:{node.lineno} lists {known}"


ARGUMENTS = {
    "abs ceil floor neg round sign square asin asinh atan atanh cbrt erf erf_inv expm1 log1p sin sinh "
    "sqrt tan tanh": 1,
    "add sub max min mul": 2,
}
CALLS = {name: count for names, count in ARGUMENTS.items() for name in names.split()}


@pytest.mark.parametrize("name", CALLS)
def test_zeros_are_preserved_as_the_table_says(name):
    call = getattr(jax.lax, name, None) or getattr(jnp, name)
    zeros = [jnp.zeros(3)] * CALLS[name]
    assert primitive(name).preserves_zero
    assert not np.any(call(*zeros))
    if primitive(name).absorbs_zero:
        assert not np.any([call(zeros[0], jnp.ones(3)), call(jnp.ones(3), zeros[0])])


def test_unknown_primitives_are_other():
    assert primitive("no such primitive").kind is Kind.OTHER


def test_roots_look_through_identities_of_every_kind():
    def fn(p, x):
        w = jax.lax.optimization_barrier(jnp.copy(p["w"]).astype(jnp.bfloat16))
        return x @ w.astype(jnp.float32), p["n"].astype(jnp.int32)

    params = {"n": jnp.ones(2), "w": jnp.ones((2, 3))}
    program = trace_program(fn, params, jnp.ones((1, 2)))
    flow = Flow(program, 2)
    (product,) = [op for op in program.operations if op.name == "dot_general"]
    assert root(flow.makers, product.ins[1]) == program.inputs[1]
    assert root(flow.makers, program.outputs[1]) == program.outputs[1], (
        "integers are cut, not passed on"
    )


def test_every_elementwise_primitive_couples():
    kinds = (Kind.IDENTITY, Kind.CAST, Kind.ELEMENTWISE)
    links = ("enter", "iterate")
    missing = [n for n, p in PRIMITIVES.items() if p.kind in kinds and n not in (*RULES, *links)]
    assert not missing
