"""Networks that examples leave early, as `flax.nnx` modules."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxprune import gates


class EarlyExit(nnx.Module):
    """BranchyNet: a head after each stage, and the examples that are sure leave; see
    `jp.linen.EarlyExit`.

    Example:
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> stages = [nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)]
      >>> net = jp.nnx.EarlyExit(stages, [8, 8], classes=3, rngs=rngs)
      >>> [y.shape for y in net(jnp.ones((4, 5)))]
      [(4, 3), (4, 3)]
    """

    def __init__(
        self,
        stages: Sequence[Callable[[Array], Array]],
        channels: Sequence[int] | None = None,
        *,
        classes: int | None = None,
        heads: Sequence[Callable[[Array], Array]] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """For stages that make so many `channels` each, or with `heads` of your own."""
        gates.check_heads(stages, classes, heads)
        self.count = len(stages)
        self._keep("stages", stages)
        if heads is not None:
            self._keep("heads", heads)
            return
        if channels is None or len(channels) != len(stages) or rngs is None:
            raise ValueError(
                "channels, rngs: expected the channels that each stage makes, and rngs"
            )
        assert classes is not None
        self._keep("dense", [nnx.Linear(n, classes, rngs=rngs) for n in channels])

    def _keep(self, name: str, modules: Sequence[Any]) -> None:
        for i, module in enumerate(
            modules
        ):  # under the names that linen gives to modules in a list
            setattr(self, f"{name}_{i}", module)

    def _kept(self, name: str) -> list[Any]:
        return [getattr(self, f"{name}_{i}") for i in range(self.count)]

    def _exits(self) -> Sequence[Callable[[Array], Array]]:
        if hasattr(self, "heads_0"):
            return self._kept("heads")
        dense = self._kept("dense")
        return [lambda x, head=head: head(gates.pooled(x, magnitude=False)) for head in dense]

    def __call__(self, x: Float[Array, "batch ..."]) -> list[Array]:
        """Logits of all heads."""
        return gates.all_exits(self._kept("stages"), self._exits(), x)

    def skip(
        self,
        x: Float[Array, "batch ..."],
        *,
        capacities: Sequence[int] | None = None,
        threshold: Any = None,
    ) -> tuple[Array, Array]:
        """Logits, and the stage where they were made; see `jp.linen.EarlyExit.skip`."""
        return gates.left_early(
            self._kept("stages"), self._exits(), x, capacities=capacities, threshold=threshold
        )
