"""Gated modules for `flax.nnx`.

Gates that draw in training take their keys from the `gates` stream of the `rngs` given when the module is
made; `deterministic=True` is inference. Called within `nnx.capture(fn, nnx.Intermediate)`, each module
hands out its gates, (batch, gates), under the name `gate`, for a cost of open gates, and their logits as
`gate_logits`, for a policy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxprune import gates


class ChannelGate(nnx.Module):
    """Gates for channels, from what a layer reads; see `jp.linen.ChannelGate`.

    Example:
      >>> from flax import nnx
      >>> gate = jp.nnx.ChannelGate(4, 6, k=2, rngs=nnx.Rngs(0))
      >>> gate(jnp.ones((3, 5, 5, 4))).shape
      (3, 6)
    """

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        method: str = "top_k",
        k: int | float = 0.5,
        reduction: int = 16,
        temperature: Any = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        """For `channels` read and `features` gates."""
        if method not in gates.METHODS:
            listed = ", ".join(map(repr, gates.METHODS))
            raise ValueError(f"method: expected one of {listed}, got {method!r}")
        if method == "top_k":
            gates.kept(k, features)
        params = gates.gate_params(rngs.params(), channels, features, reduction=reduction)
        self.reduce = nnx.Dict(jax.tree.map(nnx.Param, params["reduce"]))
        self.expand = nnx.Dict(jax.tree.map(nnx.Param, params["expand"]))
        self.method, self.k, self.temperature = method, k, temperature
        self.rngs = rngs.fork() if method in gates.RANDOM else None

    def __call__(
        self, x: Float[Array, "batch ... channels"], *, deterministic: bool = False
    ) -> Float[Array, "batch features"]:
        """Gates of shape (batch, features)."""
        params = {
            name: {"kernel": layer.kernel[...], "bias": layer.bias[...]}
            for name, layer in (("reduce", self.reduce), ("expand", self.expand))
        }
        key = None
        if self.rngs is not None and not deterministic:
            key = self.rngs.gates()
        logits = gates.gate_logits(params, x)
        found = gates.opened(logits, self.method, k=self.k, key=key, temperature=self.temperature)
        _hand_out(self, "gate", found)
        _hand_out(self, "gate_logits", logits)
        return found


class GatedConv(nnx.Module):
    """A convolution whose output channels are gated by what it reads; see `jp.linen.GatedConv`.

    Example:
      >>> from flax import nnx
      >>> conv = jp.nnx.GatedConv(4, 8, (3, 3), k=4, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((1, 6, 6, 4))
      >>> y, (few, index) = conv(x), conv.skip(x)
      >>> bool(jnp.allclose(y[..., index], few, atol=1e-5))
      True
    """

    def __init__(
        self,
        channels: int,
        features: int,
        kernel_size: Sequence[int],
        *,
        strides: Sequence[int] = (1, 1),
        padding: Any = "SAME",
        use_bias: bool = True,
        method: str = "top_k",
        k: int | float = 0.5,
        reduction: int = 16,
        temperature: Any = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        """From `channels` to `features`."""
        self.gate = ChannelGate(
            channels,
            features,
            method=method,
            k=k,
            reduction=reduction,
            temperature=temperature,
            rngs=rngs,
        )
        self.conv = nnx.Conv(
            channels,
            features,
            tuple(kernel_size),
            tuple(strides),
            padding=padding,
            use_bias=use_bias,
            rngs=rngs,
        )
        self.strides, self.padding = tuple(strides), padding

    def __call__(self, x: Float[Array, "b ... c"], *, deterministic: bool = False) -> Array:
        """All channels, those of closed gates 0."""
        y = self.conv(x)
        return y * gates.beside(self.gate(x, deterministic=deterministic), y)

    def skip(self, x: Float[Array, "1 h w c"], inputs: Any = None) -> tuple[Array, Array]:
        """Only the open channels, and their numbers; see `jp.linen.GatedConv.skip`."""
        kernel = self.conv.kernel[...]
        found, index = _open(self.gate, x, inputs, kernel.shape[-2])
        bias = None if self.conv.bias is None else self.conv.bias[...]
        y = gates.gathered_conv(
            x,
            kernel,
            bias=bias,
            inputs=inputs,
            outputs=index,
            strides=self.strides,
            padding=self.padding,
        )
        return y * found[index].astype(y.dtype), index

    def bucketed(
        self, x: Float[Array, "1 h w c"], inputs: Any = None, *, buckets: Any = gates.QUARTERS
    ) -> tuple[Array, Array]:
        """All channels, and their gates (features,); see `jp.linen.GatedConv.bucketed`."""
        found = self.gate(x, deterministic=True)[0]
        bias = None if self.conv.bias is None else self.conv.bias[...]
        y = gates.bucketed_conv(
            x,
            self.conv.kernel[...],
            found,
            bias=bias,
            inputs=inputs,
            buckets=buckets,
            strides=self.strides,
            padding=self.padding,
        )
        return y, found


class GatedDense(nnx.Module):
    """A dense layer whose outputs are gated by what it reads; see `jp.linen.GatedDense`.

    Example:
      >>> from flax import nnx
      >>> dense = jp.nnx.GatedDense(4, 8, k=4, rngs=nnx.Rngs(0))
      >>> int((dense(jnp.ones((2, 4))) != 0).sum())
      8
    """

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        use_bias: bool = True,
        method: str = "top_k",
        k: int | float = 0.5,
        reduction: int = 16,
        temperature: Any = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        """From `channels` to `features`."""
        self.gate = ChannelGate(
            channels,
            features,
            method=method,
            k=k,
            reduction=reduction,
            temperature=temperature,
            rngs=rngs,
        )
        self.dense = nnx.Linear(channels, features, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "b ... c"], *, deterministic: bool = False) -> Array:
        """All outputs, those of closed gates 0."""
        y = self.dense(x)
        return y * gates.beside(self.gate(x, deterministic=deterministic), y)

    def skip(self, x: Float[Array, "1 ... c"], inputs: Any = None) -> tuple[Array, Array]:
        """Only the open outputs, and their numbers; see `jp.linen.GatedConv.skip`."""
        kernel = self.dense.kernel[...]
        found, index = _open(self.gate, x, inputs, kernel.shape[0])
        bias = None if self.dense.bias is None else self.dense.bias[...]
        y = gates.gathered_dense(x, kernel, bias=bias, inputs=inputs, outputs=index)
        return y * found[index].astype(y.dtype), index

    def bucketed(
        self, x: Float[Array, "1 ... c"], inputs: Any = None, *, buckets: Any = gates.QUARTERS
    ) -> tuple[Array, Array]:
        """All outputs, and their gates (features,); see `jp.linen.GatedConv.bucketed`."""
        found = self.gate(x, deterministic=True)[0]
        bias = None if self.dense.bias is None else self.dense.bias[...]
        y = gates.bucketed_dense(
            x, self.dense.kernel[...], found, bias=bias, inputs=inputs, buckets=buckets
        )
        return y, found


class TokenGate(nnx.Module):
    """Mixture-of-Depths: a block runs on the tokens that score highest; see `jp.linen.TokenGate`.

    Example:
      >>> from flax import nnx
      >>> gate = jp.nnx.TokenGate(4, capacity=0.5, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (2, 6, 4))
      >>> int((gate(x, jnp.tanh) != x).any(-1).sum())
      6
    """

    def __init__(self, features: int, *, capacity: int | float = 0.5, rngs: nnx.Rngs) -> None:
        """For tokens of `features`."""
        self.score = nnx.Linear(features, 1, rngs=rngs)
        self.capacity = capacity

    def __call__(
        self, x: Float[Array, "batch time features"], block: Callable[[Array], Array]
    ) -> Float[Array, "batch time features"]:
        """`x` plus, for the chosen tokens, what the block makes of them, weighted by their score."""
        scores = self.score(x)[..., 0]
        _hand_out(self, "scores", scores)
        count = gates.kept(self.capacity, x.shape[1])
        return gates.route_top_k(block, x, scores, count, weight=jax.nn.sigmoid)


class BlockGate(nnx.Module):
    """SkipNet: whether a residual block runs, decided for each example; see `jp.linen.BlockGate`.

    Example:
      >>> from flax import nnx
      >>> gate = jp.nnx.BlockGate(4, rngs=nnx.Rngs(0))
      >>> gate(jnp.ones((2, 5, 5, 4)), jnp.tanh).shape
      (2, 5, 5, 4)
    """

    def __init__(
        self,
        channels: int,
        *,
        method: str = "straight_through",
        reduction: int = 16,
        temperature: Any = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        """For a stream of `channels`."""
        if method == "top_k":
            raise ValueError("method: 'top_k' of one block is always open; choose another")
        self.gate = ChannelGate(
            channels, 1, method=method, k=1, reduction=reduction, temperature=temperature, rngs=rngs
        )

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


class HeadGate(nnx.Module):
    """Gates for attention heads, from the mean token; see `jp.linen.HeadGate`.

    Example:
      >>> from flax import nnx
      >>> gate = jp.nnx.HeadGate(4, 8, k=1, rngs=nnx.Rngs(0))
      >>> gate(jnp.ones((2, 5, 4, 8))).shape
      (2, 5, 4, 8)
    """

    def __init__(
        self,
        heads: int,
        dims: int,
        *,
        method: str = "top_k",
        k: int | float = 0.5,
        reduction: int = 16,
        temperature: Any = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        """For `heads` of `dims` each."""
        self.gate = ChannelGate(
            heads * dims,
            heads,
            method=method,
            k=k,
            reduction=reduction,
            temperature=temperature,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "batch time heads dims"], *, deterministic: bool = False
    ) -> Float[Array, "batch time heads dims"]:
        """What heads made, that of closed ones 0."""
        found = self.gate(x.reshape(*x.shape[:2], -1), deterministic=deterministic)
        return x * found[:, None, :, None].astype(x.dtype)


def _hand_out(module: nnx.Module, name: str, value: Array) -> None:
    """Sows a value for who captures; nothing piles up in the module otherwise."""
    if hasattr(module, "__captures__"):
        module.sow(nnx.Intermediate, name, value)


def _open(gate: ChannelGate, x: Any, inputs: Any, channels: int) -> tuple[Array, Array]:
    """The gates of one example, and the numbers of the open ones."""
    found = gate(gates.spread(x, inputs, channels), deterministic=True)
    return gates.open_channels(found, gate.method, gate.k)
