"""Running a traced program at full size, operation by operation."""

from collections.abc import Callable
from typing import Any

import jax

from jaxprune.program._program import Operation, Program

Hook = Callable[[Operation, list[Any]], list[Any]]
"""`(operation, operands) -> results`; `run_operation` is what happens without one."""


def observe(program: Program, inputs: list[Any], hook: Hook) -> list[Any]:
    """Runs a program at full size, each operation by `hook`."""
    values = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
    for operation in program.operations:
        outs = hook(operation, [values[i] for i in operation.ins])
        values.update(zip(operation.outs, outs, strict=True))
    return [values[i] for i in program.outputs]


def run_operation(operation: Operation, operands: list[Any]) -> list[Any]:
    """An operation as it was traced."""
    if operation.is_relu:
        return [jax.nn.relu(operands[0])]
    # some JAX versions return functions apart
    bound = operation.primitive.get_bind_params(operation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    result = operation.primitive.bind(*functions, *operands, **params)
    return list(result) if operation.primitive.multiple_results else [result]
