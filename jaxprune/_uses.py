"""What a leaf is for: the role of each of its axes, read off a program or, failing that, conventional.

Axes are counted from the end, so that what is said of a stack of layers holds for each of them:

* *stacked*: each entry is a parameter of its own (layers of a `scan`, experts of a batched product);
* *contracted*: a product sums over it (the inputs of a layer);
* *free*: it makes features of the result (outputs), or is what a look-up picks from (tokens);
* *spatial*: the window of a convolution.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

UseKind = Literal["product", "convolution", "look-up", "elementwise", "unused", "other"]
KINDS: tuple[UseKind, ...] = (
    "product", "convolution", "look-up", "elementwise", "other", "unused",
)  # fmt: skip
"""What a leaf does; of several uses of one leaf the first in this order names it."""

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Uses:
    """What a program does with one leaf, all its uses joined; made by `jp.uses`.

    Not a pytree node: a tree of `Uses` has the structure of the parameters.

    Attributes:
      kind: `"product"`, `"convolution"`, `"look-up"`, `"elementwise"`, `"other"` (something else reads
        it) or `"unused"`.
      stacked, contracted, free, spatial: axes counted from the end, ascending. An axis of size 1, and
        the features of a look-up's rows, are in none of them.
      contradiction: what several uses disagree about, empty if nothing.
      ndim: how many axes the leaf has; `None` where it is not known.

    Example:
      >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
      >>> found = jp.uses(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((1, 4)))
      >>> found["w"].kind, found["w"].contracted, found["w"].free, found["b"].kind
      ('product', (-2,), (-1,), 'elementwise')
    """

    kind: UseKind
    stacked: Axes = ()
    contracted: Axes = ()
    free: Axes = ()
    spatial: Axes = ()
    contradiction: str = ""
    ndim: int | None = None

    @property
    def is_weight(self) -> bool:
        """Whether products, convolutions or look-ups use it: what compression is for."""
        return self.kind in ("product", "convolution", "look-up")

    @property
    def channel_axes(self) -> Axes:
        """The axes whose entries have scales of their own: stacked ones and, of weights, free ones."""
        return tuple(sorted((*self.stacked, *(self.free if self.is_weight else ()))))

    def group_axis(self, ndim: int) -> int:
        """The axis along which groups lie: the innermost contracted one, else of the window.

        Of a look-up it is the innermost axis of a row, of a vector its only one.
        """
        rest = [i for i in range(-ndim, 0) if i not in self.channel_axes]
        return max(self.contracted or self.spatial or rest or (-1,))

    def contracted_axis(self, ndim: int) -> int:
        """The axis of N:M groups: `group_axis`; of vectors that nothing sums over one that is missing."""
        return self.group_axis(ndim) if ndim > 1 or self.contracted else -2


class Convention(NamedTuple):
    """What a leaf is taken for where no program was read.

    Attributes:
      uses: the roles of its axes.
      is_sure: False where another reading of its shape is as likely.
    """

    uses: Uses
    is_sure: bool = True


_NO_WEIGHTS = frozenset(
    [
        "offset",
        "running_mean",
        "running_var",
        "moving_mean",
        "moving_var",
        "moving_variance",
    ]
)
_BIAS = re.compile(r"(^|_)bias(es)?($|_|\d)", re.IGNORECASE)
_SCALE = re.compile(r"(^|_)(scale|gamma|beta)s?_?\d*$", re.IGNORECASE)
_SHORT = re.compile(r"([bg]\d*|b_.*|.*_b|b[a-z])")  # where beside a kernel of one axis more
_NORM = re.compile(
    r"(^|_)((layer|batch|group|rms|instance)_?norm|norm|ln|bn)(_?[a-z0-9]{0,3})?$", re.IGNORECASE
)
_IN_HEADS = re.compile(r"(query|key|value|[qkv]|[qkv]_proj)", re.IGNORECASE)
_OUT_OF_HEADS = re.compile(r"(out|o|out_proj|o_proj|attn_out|dense)", re.IGNORECASE)
_LEAST_WIDTH = 64  # of heads times their dimensions, from which the shape alone tells


def conventions(paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[Convention]:
    """What leaves are by their names and shapes, as Flax and Haiku lay them out.

    Args:
      paths: '/'-joined path of each leaf of a tree.
      shapes: their shapes.

    Returns:
      One `Convention` per leaf. Arrays of three axes and more keep their leading one apart, so that
      layers that are stacked never share a scale, unless they are surely an attention's projection.
    """
    beside: dict[str, dict[str, Axes]] = {}
    for path, shape in zip(paths, shapes, strict=True):
        module, _, name = path.rpartition("/")
        beside.setdefault(module, {})[name] = tuple(shape)
    return [
        _convention(path, tuple(shape), beside[path.rpartition("/")[0]])
        for path, shape in zip(paths, shapes, strict=True)
    ]


def _convention(path: str, shape: tuple[int, ...], beside: dict[str, Axes]) -> Convention:
    """Of one leaf; `beside`: the shapes of the leaves of its module, by name."""
    n = len(shape)
    if n < 2 or _is_no_weight(path, shape, beside):
        return Convention(Uses("elementwise", tuple(range(-n, -1)), free=tuple(range(-n, 0)[-1:])))
    if n == 2:
        return Convention(Uses("product", (), (-2,), (-1,)))
    module = path.split("/")[-2] if "/" in path else ""
    stacked = tuple(range(-n, -3))
    d, h, k = shape[-3:]
    if n in (3, 4) and _IN_HEADS.fullmatch(module) and d > h:
        return Convention(Uses("product", stacked, (-3,), (-2, -1)))
    if n in (3, 4) and _OUT_OF_HEADS.fullmatch(module) and d * h == k >= _LEAST_WIDTH:
        return Convention(Uses("product", stacked, (-3, -2), (-1,)))
    if n == 3 and d == h * k >= _LEAST_WIDTH:
        return Convention(Uses("product", (), (-3,), (-2, -1)))
    inner = tuple(range(1 - n, -1))
    return Convention(Uses("product", (-n,), inner, (-1,)), is_sure=_is_window(shape))


def _is_no_weight(path: str, shape: Axes, beside: dict[str, Axes]) -> bool:
    """Whether a leaf is a bias or belongs to a normalisation, by its name."""
    *_, module, name = ("", *path.split("/"))
    if name.lower() in _NO_WEIGHTS or any(r.search(name) for r in (_BIAS, _NORM, _SCALE)):
        return True
    if name in ("mean", "var"):
        return {"mean", "var"} <= beside.keys()
    without_one = [x[:i] + x[i + 1 :] for x in beside.values() for i in range(len(x) - 1)]
    if _SHORT.fullmatch(name) and shape in without_one:
        return True
    in_norm = bool(_NORM.search(module)) and max(map(len, beside.values())) == len(shape)
    return in_norm and name in ("weight", "w", "g", "b")


def _is_window(shape: tuple[int, ...]) -> bool:
    """Whether the leading axes are surely the window of a convolution."""
    return len(shape) in (4, 5) and int(np.max(shape[:-2])) <= 7
