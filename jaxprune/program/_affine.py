"""Biases and batch normalisations: what is added to the results of products, and what scales them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxprune.program._flow import Flow
from jaxprune.program._primitives import is_product
from jaxprune.program._program import Operation, Program


class Norm(NamedTuple):
    """A normalisation by running statistics: `(x - mean) * scale / sqrt(var + epsilon) + bias`.

    Attributes: leaf numbers, `None` where there is none.
      weight: of the product whose result it normalises.
      product_bias: added before.
      mean, var, scale, bias: its own.
      epsilon: a number.
      values: numbers of the values between the product and the end.
      others: what else reads a leaf or a value of it; empty where nothing does.
    """

    weight: int
    product_bias: int | None
    mean: int
    var: int
    scale: int | None
    bias: int | None
    epsilon: float
    values: tuple[int, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[int, ...]:
        """All its leaves."""
        own = (self.weight, self.product_bias, self.mean, self.var, self.scale, self.bias)
        return tuple(i for i in own if i is not None)


class Pair(NamedTuple):
    """A bias and the weight whose product it is added to.

    Attributes:
      weight, bias: leaf numbers.
      others: what else reads one of them, or the product: where nothing does, it is empty.
    """

    weight: int
    bias: int
    others: tuple[str, ...]


def biases_of(program: Program, n_leaves: int) -> list[Pair]:
    """For each weight the leaf that is added to its product, in inner programs too."""
    walk = _Walk(program, n_leaves)
    found: dict[tuple[int, int], list[int]] = {}
    for operation in walk.flow.operations:
        if operation.name != "add":
            continue
        for product, other in (operation.ins, operation.ins[::-1]):
            w, b = walk.product(product), walk.flow.leaf(other)
            if w is not None and b is not None:
                found.setdefault((w, b), []).append(product)
    pairs = {}
    for (w, b), products in found.items():
        pairs.setdefault(w, Pair(w, b, walk.others(products, (w, b), len(products))))
    return list(pairs.values())


def norms_of(program: Program, n_leaves: int) -> list[Norm]:
    """Normalisations by running statistics that follow products, in inner programs too.

    The longest chain at each product: with scale and bias, if there are.
    """
    walk = _Walk(program, n_leaves)
    chains = [norm for norm in map(walk.norm, walk.ends()) if norm is not None]
    best: dict[int, Norm] = {}
    for norm in chains:
        if norm.weight not in best or len(norm.leaves) > len(best[norm.weight].leaves):
            best[norm.weight] = norm
    found = []
    for norm in best.values():
        alike = [other for other in chains if other.leaves == norm.leaves]
        values = [number for other in alike for number in other.values]
        found.append(norm._replace(others=walk.others(values, norm.leaves, len(alike))))
    return found


class _Walk:
    """Which values are leaves, products and parts of normalisations."""

    def __init__(self, program: Program, n_leaves: int) -> None:
        self.program, self.flow = program, Flow(program, n_leaves)
        self.numbers = program.inputs[:n_leaves]

    def product(self, number: int) -> int | None:
        """The weight of the product that a value is, if it is one with data."""
        operation = self.maker(number)
        if operation is None or not is_product(operation.name):
            return None
        sides = [self.flow.leaf(i) for i in operation.ins[:2]]
        known = [i for i in sides if i is not None]
        return known[0] if len(known) == 1 else None

    def maker(self, number: int) -> Operation | None:
        """The operation that makes a value, apart from views."""
        return self.flow.makers.get(self.flow.root(number))

    def others(self, values: Iterable[int], leaves: Iterable[int], times: int) -> tuple[str, ...]:
        """What else reads the values of some chains, each of which one operation should, or their leaves,
        which as many operations should as there are chains.
        """
        wanted = {self.flow.root(number): 1 for number in values}
        wanted |= {self.numbers[i]: times for i in leaves}
        found: list[str] = []
        for number, count in wanted.items():
            readers = self.flow.readers(number)
            if len(readers) != count:
                sources = (x.source or x.name if x else "an output" for x in readers)
                found.append(" and ".join(dict.fromkeys(sources)))
        return tuple(dict.fromkeys(found))

    def ends(self) -> list[int]:
        """Values that a normalisation may end in."""
        return [op.outs[0] for op in self.flow.operations if op.name in ("add", "mul")]

    def sides(self, number: int, name: str) -> list[tuple[int, int]]:
        operation = self.maker(number)
        if operation is None or operation.name != name:
            return []
        a, b = operation.ins
        return [(a, b)] if name == "sub" else [(a, b), (b, a)]

    def norm(self, number: int) -> Norm | None:
        """The normalisation that ends in a value, if one does."""
        for inner, bias in self.sides(number, "add"):
            leaf = self.flow.leaf(bias)
            found = self._scaled(inner) if leaf is not None else None
            if found is not None:
                return found._replace(bias=leaf, values=(*found.values, inner))
        return self._scaled(number)

    def _scaled(self, number: int) -> Norm | None:
        for centred, gain in self.sides(number, "mul"):
            found, base = self._gain(gain), self._centred(centred)
            if found is not None and base is not None:
                (weight, product_bias, mean, values), (var, scale, epsilon, more) = base, found
                values = (*values, *more, centred, gain)
                return Norm(weight, product_bias, mean, var, scale, None, epsilon, values)
        for other, gain in self.sides(number, "mul"):  # (x * rsqrt) * scale
            scale, inner = self.flow.leaf(gain), self._scaled(other)
            if scale is not None and inner is not None and inner.scale is None:
                return inner._replace(scale=scale, values=(*inner.values, other))
        return None

    def _gain(self, number: int) -> tuple[int, int | None, float, tuple[int, ...]] | None:
        for root, other in self.sides(number, "mul"):
            leaf, inner = self.flow.leaf(other), self._gain(root)
            if leaf is not None and inner is not None and inner[1] is None:
                return inner[0], leaf, inner[2], (*inner[3], root)
        operation = self.maker(number)
        if operation is None or operation.name != "rsqrt":
            return None
        for var, constant in self.sides(operation.ins[0], "add"):
            leaf, value = self.flow.leaf(var), self._constant(constant)
            if leaf is not None and value is not None:
                return leaf, None, value, operation.ins
        return None

    def _constant(self, number: int) -> float | None:
        value: Any = self.flow.constants.get(self.flow.root(number))
        return float(value) if value is not None and np.ndim(value) == 0 else None

    def _centred(self, number: int) -> tuple[int, int | None, int, tuple[int, ...]] | None:
        for value, mean in self.sides(number, "sub"):
            leaf = self.flow.leaf(mean)
            if leaf is None:
                continue
            weight = self.product(value)
            if weight is not None:
                return weight, None, leaf, (value,)
            for inner, bias in self.sides(value, "add"):
                weight, other = self.product(inner), self.flow.leaf(bias)
                if weight is not None and other is not None:
                    return weight, other, leaf, (inner, value)
        return None
