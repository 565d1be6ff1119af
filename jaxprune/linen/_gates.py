"""Gated modules for `flax.linen`.

Gates that draw in training take their keys from the `gates` stream, `apply(…, rngs={"gates": key})`;
`deterministic=True` is inference. Each module hands its gates, (batch, gates), to the `gates` collection:
`apply(…, mutable=["gates"])` returns them, for a cost of open gates; and their logits to the collection
`gate_logits`, for a policy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from jaxprune import gates


class ChannelGate(nn.Module):
    """Gates for channels, from what a layer reads: pooling, a bottleneck, logits.

    Attributes:
      features: gates.
      method: `"top_k"`, `"straight_through"`, `"gumbel"`, `"semantic_hashing"`, `"hard_concrete"` or
        `"bernoulli"`, see `jp.gates.opened`.
      k: of `"top_k"`: how many stay open, or which fraction.
      reduction: of the bottleneck; few channels keep at least 4 neurons.
      temperature: of gates that draw.

    Example:
      >>> gate = jp.linen.ChannelGate(features=6, k=2)
      >>> params = gate.init(jax.random.key(0), jnp.ones((3, 5, 5, 4)))
      >>> gates = gate.apply(params, jnp.ones((3, 5, 5, 4)))
      >>> gates.shape, int((gates > 0).sum())
      ((3, 6), 6)
    """

    features: int
    method: str = "top_k"
    k: int | float = 0.5
    reduction: int = 16
    temperature: Any = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ... channels"], *, deterministic: bool = False
    ) -> Float[Array, "batch features"]:
        """Gates of shape (batch, features), for any number of axes between batch and channels."""
        make = lambda key, layer: gates.gate_params(
            key, x.shape[-1], self.features, reduction=self.reduction
        )[layer]
        params = {layer: self.param(layer, make, layer) for layer in ("reduce", "expand")}
        draws = self.method in gates.RANDOM and not deterministic and not self.is_initializing()
        key = self.make_rng("gates") if draws else None
        logits = gates.gate_logits(params, x)
        found = gates.opened(logits, self.method, k=self.k, key=key, temperature=self.temperature)
        self.sow("gates", "gate", found)
        self.sow("gate_logits", "gate", logits)
        return found


class GatedConv(nn.Module):
    """A convolution whose output channels are gated by what it reads.

    Attributes:
      features: output channels.
      kernel_size, strides, padding, use_bias: as in `nn.Conv`.
      method, k, reduction, temperature: see `ChannelGate`.

    Example:
      >>> conv = jp.linen.GatedConv(features=8, kernel_size=(3, 3), k=4)
      >>> params = conv.init(jax.random.key(0), jnp.ones((1, 6, 6, 4)))
      >>> y = conv.apply(params, jnp.ones((1, 6, 6, 4)))
      >>> few, index = conv.apply(params, jnp.ones((1, 6, 6, 4)), method="skip")
      >>> bool(jnp.allclose(y[..., index], few, atol=1e-5)), few.shape
      (True, (1, 6, 6, 4))
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] = (1, 1)
    padding: Any = "SAME"
    use_bias: bool = True
    method: str = "top_k"
    k: int | float = 0.5
    reduction: int = 16
    temperature: Any = 1.0

    def setup(self) -> None:
        """Gate and convolution."""
        self.gate = ChannelGate(
            self.features, self.method, self.k, self.reduction, self.temperature
        )
        self.conv = nn.Conv(
            self.features,
            tuple(self.kernel_size),
            tuple(self.strides),
            self.padding,
            use_bias=self.use_bias,
        )

    def __call__(self, x: Float[Array, "b ... c"], *, deterministic: bool = False) -> Array:
        """All channels, those of closed gates 0."""
        y = self.conv(x)
        return y * gates.beside(self.gate(x, deterministic=deterministic), y)

    def skip(
        self, x: Float[Array, "1 h w c"], inputs: Any = None
    ) -> tuple[Float[Array, "1 h w k"], Array]:
        """Only the open channels, and their numbers: the work of the others is not done.

        For `"top_k"` gates and a batch of 1; `inputs` are the numbers of the channels that `x` holds,
        if it comes from another skipping layer (the gate then reads zeros for the others).
        """
        weights = self.conv.variables["params"]
        whole = gates.spread(x, inputs, weights["kernel"].shape[-2])
        opened = self.gate(whole, deterministic=True)
        found, index = gates.open_channels(opened, self.method, self.k)
        y = gates.gathered_conv(
            x,
            weights["kernel"],
            bias=weights.get("bias"),
            inputs=inputs,
            outputs=index,
            strides=self.strides,
            padding=self.padding,
        )
        return y * found[index].astype(y.dtype), index

    def bucketed(
        self, x: Float[Array, "1 h w c"], inputs: Any = None, *, buckets: Any = gates.QUARTERS
    ) -> tuple[Array, Array]:
        """All channels, and their gates (features,): only a bucket that holds the open ones is computed.

        For gates that open any number, and a batch of 1; `inputs` are the gates of the channels of `x`,
        if it comes from another gated layer. See `jp.gates.bucketed_conv`.
        """
        weights = self.conv.variables["params"]
        found = self.gate(x, deterministic=True)[0]
        y = gates.bucketed_conv(
            x,
            weights["kernel"],
            found,
            bias=weights.get("bias"),
            inputs=inputs,
            buckets=buckets,
            strides=self.strides,
            padding=self.padding,
        )
        return y, found


class GatedDense(nn.Module):
    """A dense layer whose outputs are gated by what it reads.

    Attributes:
      features: outputs.
      use_bias: as in `nn.Dense`.
      method, k, reduction, temperature: see `ChannelGate`.

    Example:
      >>> dense = jp.linen.GatedDense(features=8, k=4)
      >>> params = dense.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> int((dense.apply(params, jnp.ones((2, 4))) != 0).sum())
      8
    """

    features: int
    use_bias: bool = True
    method: str = "top_k"
    k: int | float = 0.5
    reduction: int = 16
    temperature: Any = 1.0

    def setup(self) -> None:
        """Gate and product."""
        self.gate = ChannelGate(
            self.features, self.method, self.k, self.reduction, self.temperature
        )
        self.dense = nn.Dense(self.features, use_bias=self.use_bias)

    def __call__(self, x: Float[Array, "b ... c"], *, deterministic: bool = False) -> Array:
        """All outputs, those of closed gates 0."""
        y = self.dense(x)
        return y * gates.beside(self.gate(x, deterministic=deterministic), y)

    def skip(self, x: Float[Array, "1 ... c"], inputs: Any = None) -> tuple[Array, Array]:
        """Only the open outputs, and their numbers; see `GatedConv.skip`."""
        weights = self.dense.variables["params"]
        whole = gates.spread(x, inputs, weights["kernel"].shape[0])
        opened = self.gate(whole, deterministic=True)
        found, index = gates.open_channels(opened, self.method, self.k)
        y = gates.gathered_dense(
            x, weights["kernel"], bias=weights.get("bias"), inputs=inputs, outputs=index
        )
        return y * found[index].astype(y.dtype), index

    def bucketed(
        self, x: Float[Array, "1 ... c"], inputs: Any = None, *, buckets: Any = gates.QUARTERS
    ) -> tuple[Array, Array]:
        """All outputs, and their gates (features,); see `GatedConv.bucketed`."""
        weights = self.dense.variables["params"]
        found = self.gate(x, deterministic=True)[0]
        y = gates.bucketed_dense(
            x, weights["kernel"], found, bias=weights.get("bias"), inputs=inputs, buckets=buckets
        )
        return y, found


class HeadGate(nn.Module):
    """Gates for attention heads, from the mean token.

    Attributes:
      method, k, reduction, temperature: see `ChannelGate`.

    Example:
      >>> gate = jp.linen.HeadGate(k=1)
      >>> x = jnp.ones((2, 5, 4, 8))  # (batch, time, heads, dims)
      >>> y = gate.apply(gate.init(jax.random.key(0), x), x)
      >>> y.shape, int((y[:, 0, :, 0] != 0).sum())
      ((2, 5, 4, 8), 2)
    """

    method: str = "top_k"
    k: int | float = 0.5
    reduction: int = 16
    temperature: Any = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time heads dims"], *, deterministic: bool = False
    ) -> Float[Array, "batch time heads dims"]:
        """What heads made, that of closed ones 0."""
        flat = x.reshape(*x.shape[:2], -1)
        gate = ChannelGate(
            x.shape[2], self.method, self.k, self.reduction, self.temperature, name="gate"
        )
        found = gate(flat, deterministic=deterministic)
        return x * found[:, None, :, None].astype(x.dtype)


class TokenGate(nn.Module):
    """Mixture-of-Depths: a block runs on the tokens of each example that score highest.

    Attributes:
      capacity: tokens that the block takes, or which fraction.

    Example:
      >>> gate = jp.linen.TokenGate(capacity=0.5)
      >>> x = jax.random.normal(jax.random.key(0), (2, 6, 4))
      >>> params = gate.init(jax.random.key(1), x, jnp.tanh)
      >>> y = gate.apply(params, x, jnp.tanh)
      >>> int((y != x).any(-1).sum())
      6

    Reference: Raposo et al., "Mixture-of-Depths", 2024, https://arxiv.org/abs/2404.02258
    """

    capacity: int | float = 0.5

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time features"], block: Callable[[Array], Array]
    ) -> Float[Array, "batch time features"]:
        """`x` plus, for the chosen tokens, what the block makes of them, weighted by their score."""
        scores = nn.Dense(1, name="score")(x)[..., 0]
        count = gates.kept(self.capacity, x.shape[1])
        self.sow("gates", "scores", scores)
        return gates.route_top_k(block, x, scores, count, weight=jax.nn.sigmoid)


class BlockGate(nn.Module):
    """SkipNet: whether a residual block runs, decided for each example.

    Attributes:
      method, temperature: see `ChannelGate` (not `"top_k"`).
      reduction: of the bottleneck.

    Example:
      >>> gate = jp.linen.BlockGate()
      >>> x = jnp.ones((2, 5, 5, 4))
      >>> params = gate.init(jax.random.key(0), x, jnp.tanh)
      >>> gate.apply(params, x, jnp.tanh).shape
      (2, 5, 5, 4)

    Reference: Wang et al., SkipNet, 2017, https://arxiv.org/abs/1711.09485
    """

    method: str = "straight_through"
    reduction: int = 16
    temperature: Any = 1.0

    def setup(self) -> None:
        """The gate."""
        if self.method == "top_k":
            raise ValueError("method: 'top_k' of one block is always open; choose another")
        self.gate = ChannelGate(1, self.method, 1, self.reduction, self.temperature)

    def __call__(
        self,
        x: Float[Array, "batch ..."],
        block: Callable[[Array], Array],
        *,
        deterministic: bool = False,
    ) -> Array:
        """`x + gate * block(x)`; the block runs for all."""
        found = self.gate(x, deterministic=deterministic)
        return x + block(x) * found.reshape(-1, *(1 for _ in x.shape[1:])).astype(x.dtype)

    def skip(self, x: Float[Array, "1 ..."], block: Callable[[Array], Array]) -> Array:
        """The same for a batch of 1; the block runs only if its gate is open (and is then not
        weighted).
        """
        return gates.skip_block(self.gate(x, deterministic=True)[0, 0], block, x)


class EarlyExit(nn.Module):
    """BranchyNet: a head after each stage, and the examples that are sure leave there.

    Attributes:
      stages: modules, each on what the one before made.
      classes: of each head: the mean over what lies between batch and channels, and a dense layer.
      heads: modules to use instead, one per stage.

    Example:
      >>> net = jp.linen.EarlyExit([nn.Dense(8), nn.Dense(8)], classes=3)
      >>> x = jnp.ones((4, 5))
      >>> params = net.init(jax.random.key(0), x)
      >>> [y.shape for y in net.apply(params, x)]  # of all heads, for `jp.gates.exit_loss`
      [(4, 3), (4, 3)]
      >>> logits, left = net.apply(params, x, capacities=[1], method="skip")
      >>> logits.shape, int((left == 1).sum())
      ((4, 3), 1)

    Reference: Teerapittayanon et al., BranchyNet, 2017, https://arxiv.org/abs/1709.01686
    """

    stages: Sequence[Callable[[Array], Array]]
    classes: int | None = None
    heads: Sequence[Callable[[Array], Array]] | None = None

    def setup(self) -> None:
        """The heads."""
        gates.check_heads(self.stages, self.classes, self.heads)
        if self.heads is None:
            self.dense = [nn.Dense(self.classes) for _ in self.stages]  # ty: ignore

    def _exits(self) -> Sequence[Callable[[Array], Array]]:
        if self.heads is not None:
            return self.heads
        return [lambda x, head=head: head(gates.pooled(x, magnitude=False)) for head in self.dense]

    def __call__(self, x: Float[Array, "batch ..."]) -> list[Array]:
        """Logits of all heads."""
        return gates.all_exits(self.stages, self._exits(), x)

    def skip(
        self,
        x: Float[Array, "batch ..."],
        *,
        capacities: Sequence[int] | None = None,
        threshold: Any = None,
    ) -> tuple[Array, Array]:
        """Logits, and the stage where they were made; later stages do not run.

        Either `capacities` (how many examples each later stage takes, see `jp.gates.early_exit`) or a
        `threshold` for a batch of 1 (see `jp.gates.exit_when_confident`).
        """
        return gates.left_early(
            self.stages, self._exits(), x, capacities=capacities, threshold=threshold
        )
