"""Biases and batch normalisations: what is added to the results of products, and what scales them."""

from typing import Any, NamedTuple

import numpy as np

from jaxprune.program._program import Operation, Program

_SAME = (
    "reshape",
    "broadcast_in_dim",
    "convert_element_type",
    "transpose",
    "squeeze",
    "expand_dims",
)
_PRODUCTS = ("dot_general", "conv_general_dilated")


class Norm(NamedTuple):
    """A normalisation by running statistics: `(x - mean) * scale / sqrt(var + epsilon) + bias`.

    Attributes: leaf numbers, `None` where there is none.
      weight: of the product whose result it normalises.
      product_bias: added before.
      mean, var, scale, bias: its own.
      epsilon: a number.
    """

    weight: int
    product_bias: int | None
    mean: int
    var: int
    scale: int | None
    bias: int | None
    epsilon: float


def biases_of(program: Program, n_leaves: int) -> dict[int, int]:
    """For each weight the leaf that is added to its product, where neither has another use."""
    walk = _Walk(program, n_leaves)
    found: dict[int, int] = {}
    for operation in program.operations:
        if operation.primitive.name != "add":
            continue
        for product, other in (operation.ins, operation.ins[::-1]):
            w, b = walk.kind(product, "product"), walk.kind(other, "leaf")
            if w is not None and b is not None and walk.once(w[1], b[1], product):
                found[w[1]] = b[1]
    return found


def norms_of(program: Program, n_leaves: int) -> list[Norm]:
    """Normalisations by running statistics that follow products, all of whose leaves have one use."""
    walk = _Walk(program, n_leaves)
    found = []
    for end in walk.ends():
        norm = walk.norm(end)
        if norm is not None:
            found.append(norm)
    best: dict[int, Norm] = {}
    for norm in found:  # the longest chain: with scale and bias, if there are
        known = best.get(norm.weight)
        length = lambda n: sum(x is not None for x in n)
        if known is None or length(norm) > length(known):
            best[norm.weight] = norm
    leaves = [i for n in best.values() for i in n[:-1] if i is not None]
    return [n for n in best.values() if all(leaves.count(i) == 1 for i in n[:-1] if i is not None)]


class _Walk:
    """Which values are leaves, products and parts of normalisations, and how often each is read."""

    def __init__(self, program: Program, n_leaves: int) -> None:
        self.program = program
        self.made: dict[int, Operation] = {}
        self.reads: dict[int, int] = {}
        for operation in program.operations:
            for number in operation.ins:
                self.reads[number] = self.reads.get(number, 0) + 1
            for number in operation.outs:
                self.made[number] = operation
        for number in program.outputs:
            self.reads[number] = self.reads.get(number, 0) + 1
        self.leaves = {number: i for i, number in enumerate(program.inputs[:n_leaves])}
        self.numbers = list(program.inputs[:n_leaves])

    def root(self, number: int) -> int:
        """What a value is, apart from its shape and type."""
        while number in self.made and self.made[number].primitive.name in _SAME:
            number = self.made[number].ins[0]
        return number

    def kind(self, number: int, wanted: str) -> tuple[str, int] | None:
        """`("leaf", i)` or `("product", weight)`, if it is that."""
        number = self.root(number)
        if number in self.leaves:
            return ("leaf", self.leaves[number]) if wanted == "leaf" else None
        operation = self.made.get(number)
        if wanted == "product" and operation and operation.primitive.name in _PRODUCTS:
            sides = [self.leaves.get(self.root(i)) for i in operation.ins[:2]]
            known = [i for i in sides if i is not None]
            return ("product", known[0]) if len(known) == 1 else None
        return None

    def once(self, weight: int, leaf: int, product: int) -> bool:
        """Whether weight, leaf and product are each read once."""
        numbers = (self.numbers[weight], self.numbers[leaf], self.root(product))
        return all(self.reads.get(i, 0) == 1 for i in numbers)

    def ends(self) -> list[int]:
        """Values that a normalisation may end in."""
        names = ("add", "mul")
        return [op.outs[0] for op in self.program.operations if op.primitive.name in names]

    def sides(self, number: int, name: str) -> list[tuple[int, int]]:
        operation = self.made.get(self.root(number))
        if operation is None or operation.primitive.name != name:
            return []
        a, b = operation.ins
        return [(a, b)] if name == "sub" else [(a, b), (b, a)]

    def norm(self, number: int) -> Norm | None:
        """The normalisation that ends in a value, if one does."""
        for inner, bias in self.sides(number, "add"):
            leaf = self.kind(bias, "leaf")
            found = self._scaled(inner) if leaf else None
            if found is not None and leaf is not None:
                return found._replace(bias=leaf[1])
        return self._scaled(number)

    def _scaled(self, number: int) -> Norm | None:
        for centred, gain in self.sides(number, "mul"):
            found = self._gain(gain)
            base = self._centred(centred)
            if found is not None and base is not None:
                weight, product_bias, mean = base
                var, scale, epsilon = found
                return Norm(weight, product_bias, mean, var, scale, None, epsilon)
        return None

    def _gain(self, number: int) -> tuple[int, int | None, float] | None:
        for root, other in self.sides(number, "mul"):
            leaf, inner = self.kind(other, "leaf"), self._gain(root)
            if leaf is not None and inner is not None and inner[1] is None:
                return inner[0], leaf[1], inner[2]
        operation = self.made.get(self.root(number))
        if operation is None or operation.primitive.name != "rsqrt":
            return None
        for var, constant in self.sides(operation.ins[0], "add"):
            leaf, value = self.kind(var, "leaf"), self._constant(constant)
            if leaf is not None and value is not None:
                return leaf[1], None, value
        return None

    def _constant(self, number: int) -> float | None:
        value: Any = self.program.constants.get(self.root(number))
        return float(value) if value is not None and np.ndim(value) == 0 else None

    def _centred(self, number: int) -> tuple[int, int | None, int] | None:
        for value, mean in self.sides(number, "sub"):
            leaf = self.kind(mean, "leaf")
            if leaf is None or self.reads.get(self.root(value), 0) != 1:
                continue
            product = self.kind(value, "product")
            if product is not None:
                return product[1], None, leaf[1]
            for inner, bias in self.sides(value, "add"):
                product, other = self.kind(inner, "product"), self.kind(bias, "leaf")
                if product is not None and other is not None:
                    return product[1], other[1], leaf[1]
        return None
