"""Layers of fixed connectivity for `flax.linen`: weights that do not exist are no parameters.

Parameters are `values`, compact, and `bias`. Where the weights are, if the shape alone does not say it,
is the `index` of the collection `connectivity`: drawn by `init` from the `params` stream, then constant.
Pass both to `apply`; give `jax.grad` and the optimizer the `params` alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int

from jaxprune import sparse

Initializer = Callable[..., Array]
_EMBED = initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class _Sparse(nn.Module):
    """What layers of fixed connectivity share: their variables."""

    def _kernel(self, shape: tuple[int, ...], init: Any, dtype: Any, transposed: bool) -> Any:
        connectivity = self.connectivity
        draw = lambda: connectivity.draw(self.make_rng("params"), shape)
        connectivity.values_shape(shape)  # its errors come before those of Flax
        index = None
        wanted = jax.eval_shape(lambda: connectivity.draw(jax.random.key(0), shape))
        if wanted is not None:
            index = self._index(draw)
            if index.shape != wanted.shape:
                raise ValueError(
                    f"index: expected {wanted.shape} for a kernel of {shape}, got {index.shape}; the "
                    "layer was initialized for inputs of another width"
                )
        make = lambda key: sparse.initial_values(
            init, key, connectivity, index, shape, dtype=dtype, transposed=transposed
        )
        return self.param("values", make), index

    def _index(self, draw: Any) -> Array:
        if not (self.has_variable("connectivity", "index") or self.is_initializing()):
            raise ValueError(
                f"{'/'.join(self.path) or type(self).__name__}: no index in the collection "
                "'connectivity'; pass all that init returned to apply, not the params alone"
            )
        return self.variable("connectivity", "index", draw).value


class SparseDense(_Sparse):
    """A dense layer of which only some weights exist.

    Attributes:
      features: outputs.
      connectivity: which weights exist: `jp.sparse.RandomEntries`, `RandomNM`, `FixedEntries`,
        `block_diagonal` or `butterfly`.
      use_bias, dtype, param_dtype, precision, bias_init: as in `nn.Dense`.
      kernel_init: its fans are the connections that exist.

    Example:
      >>> layer = jp.linen.SparseDense(6, jp.sparse.RandomEntries(0.75))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8)))
      >>> jax.tree.map(jnp.shape, variables)
      {'connectivity': {'index': (12,)}, 'params': {'bias': (6,), 'values': (12,)}}
      >>> dense = layer.to_dense(variables, 8)
      >>> x = jnp.arange(8.0)
      >>> bool(jnp.allclose(layer.apply(variables, x), x @ dense["kernel"], atol=1e-5))
      True
    """

    features: int
    connectivity: sparse.Connectivity
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = initializers.lecun_normal()
    bias_init: Initializer = initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows features"]:
        """(rows…, features)."""
        shape = (jnp.shape(x)[-1], self.features)
        values, index = self._kernel(shape, self.kernel_init, self.param_dtype, False)
        bias = _bias(self)
        x, values, bias = promote_dtype(x, values, bias, dtype=self.dtype)
        y = sparse.sparse_dot(
            x, values, index, self.connectivity, self.features, precision=self.precision
        )
        return y if bias is None else y + bias

    def to_dense(self, variables: Any, inputs: int) -> dict[str, Array]:
        """Parameters of an `nn.Dense` that gives the same. Inverse: `from_mask`."""
        return _dense_params(self.connectivity, variables, (inputs, self.features))

    @classmethod
    def from_mask(
        cls, params: Any, mask: Bool[Array, "inputs features"], **options: Any
    ) -> tuple["SparseDense", dict[str, Any]]:
        """A layer and its variables, from the parameters of an `nn.Dense` and a mask.

        `options` are attributes; `connectivity` says how the weights are held, by default for any mask.

        Example:
          >>> dense = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
          >>> layer, variables = jp.linen.SparseDense.from_mask(dense, dense["kernel"] > 2)
          >>> layer.apply(variables, jnp.ones(2)).tolist()
          [3.0, 4.0]
        """
        connectivity, variables = _held(params, mask, 2, options)
        use_bias = options.pop("use_bias", "bias" in params)
        layer = cls(params["kernel"].shape[-1], connectivity, use_bias=use_bias, **options)
        return layer, variables


class SparseConv(_Sparse):
    """A convolution of which only some weights exist.

    Attributes:
      features: output channels.
      kernel_size: one entry for each axis of space.
      connectivity: see `SparseDense`; `block_diagonal` and `butterfly` connect channels.
      strides, padding, input_dilation, kernel_dilation: as in `nn.Conv`; see `jp.sparse.sparse_conv`.
      use_bias, dtype, param_dtype, precision, bias_init: as in `nn.Conv`.
      kernel_init: its fans are the connections that exist.

    Example:
      >>> layer = jp.linen.SparseConv(8, (3, 3), jp.sparse.block_diagonal(4))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 4)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (8,), 'values': (3, 3, 4, 1, 2)}}
      >>> layer.apply(variables, jnp.ones((1, 5, 5, 4))).shape
      (1, 5, 5, 8)
    """

    features: int
    kernel_size: Sequence[int]
    connectivity: sparse.Connectivity
    strides: int | Sequence[int] = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] = 1
    kernel_dilation: int | Sequence[int] = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = initializers.lecun_normal()
    bias_init: Initializer = initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*out features"]:
        """(batch…, space…, features)."""
        shape = (*self.kernel_size, jnp.shape(x)[-1], self.features)
        values, index = self._kernel(shape, self.kernel_init, self.param_dtype, False)
        bias = _bias(self)
        x, values, bias = promote_dtype(x, values, bias, dtype=self.dtype)
        y = sparse.sparse_conv(
            x,
            values,
            index,
            self.connectivity,
            shape,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            precision=self.precision,
        )
        return y if bias is None else y + bias

    def to_dense(self, variables: Any, inputs: int) -> dict[str, Array]:
        """Parameters of an `nn.Conv` that gives the same. Inverse: `from_mask`."""
        shape = (*self.kernel_size, inputs, self.features)
        return _dense_params(self.connectivity, variables, shape)

    @classmethod
    def from_mask(
        cls, params: Any, mask: Bool[Array, "*window inputs features"], **options: Any
    ) -> tuple["SparseConv", dict[str, Any]]:
        """A layer and its variables, from the parameters of an `nn.Conv` and a mask.

        `options` are attributes; `connectivity` says how the weights are held, by default for any mask.
        """
        connectivity, variables = _held(params, mask, None, options)
        *window, _, features = params["kernel"].shape
        use_bias = options.pop("use_bias", "bias" in params)
        return cls(features, tuple(window), connectivity, use_bias=use_bias, **options), variables


class SparseEmbed(_Sparse):
    """A table of which only some entries exist.

    Attributes:
      num_embeddings: tokens.
      features: length of a row.
      connectivity: see `SparseDense`, of a kernel (features, tokens): the table is its transpose.
      dtype, param_dtype: as in `nn.Embed`.
      embedding_init: its fans are the entries that exist.

    Example:
      >>> layer = jp.linen.SparseEmbed(10, 8, jp.sparse.RandomNM(2, 4))
      >>> variables = layer.init(jax.random.key(0), jnp.array([1]))
      >>> row = layer.apply(variables, jnp.array([3]))
      >>> row.shape, int((row != 0).sum())
      ((1, 8), 4)
    """

    num_embeddings: int
    features: int
    connectivity: sparse.Connectivity
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: Initializer = _EMBED

    def setup(self) -> None:
        """The table."""
        self._table = self._kernel(
            (self.features, self.num_embeddings), self.embedding_init, self.param_dtype, True
        )

    def __call__(self, inputs: Int[Array, "*ids"]) -> Float[Array, "*ids features"]:
        """Rows of the table."""
        values, index = self._table
        (values,) = promote_dtype(values, dtype=self.dtype, inexact=False)
        shape = (self.features, self.num_embeddings)
        return sparse.sparse_take(inputs, values, index, self.connectivity, shape)

    def attend(self, query: Float[Array, "*rows features"]) -> Float[Array, "*rows tokens"]:
        """Products with every row: logits, where the table is that of the outputs too."""
        values, index = self._table
        query, values = promote_dtype(query, values, dtype=self.dtype)
        return sparse.sparse_dot(query, values, index, self.connectivity, self.num_embeddings)

    def to_dense(self, variables: Any) -> dict[str, Array]:
        """Parameters of an `nn.Embed` that gives the same. Inverse: `from_mask`."""
        shape = (self.features, self.num_embeddings)
        return {"embedding": _dense_params(self.connectivity, variables, shape)["kernel"].T}

    @classmethod
    def from_mask(
        cls, params: Any, mask: Bool[Array, "tokens features"], **options: Any
    ) -> tuple["SparseEmbed", dict[str, Any]]:
        """A layer and its variables, from the parameters of an `nn.Embed` and a mask of its table.

        `options` are attributes; `connectivity` says how the weights are held, by default for any mask.
        """
        table = params["embedding"]
        mask = jnp.broadcast_to(mask, table.shape)
        connectivity, variables = _held({"kernel": table.T}, mask.T, 2, options)
        tokens, features = table.shape
        return cls(tokens, features, connectivity, **options), variables


def _bias(layer: Any) -> Array | None:
    if not layer.use_bias:
        return None
    return layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype)


def _dense_params(
    connectivity: sparse.Connectivity, variables: Any, shape: tuple[int, ...]
) -> dict[str, Array]:
    params, index = variables["params"], variables.get("connectivity", {}).get("index")
    wanted = connectivity.values_shape(shape)
    if params["values"].shape != wanted:
        raise ValueError(f"values: expected {wanted} for {shape}, got {params['values'].shape}")
    kernel = connectivity.dense(params["values"], index, shape)
    return {"kernel": kernel, **({"bias": params["bias"]} if "bias" in params else {})}


def _held(
    params: Any, mask: Any, rank: int | None, options: dict[str, Any]
) -> tuple[sparse.Connectivity, dict[str, Any]]:
    """Connectivity and variables; takes `connectivity` out of the options."""
    kernel = params["kernel"]
    if kernel.ndim < 2 or (rank is not None and kernel.ndim != rank):
        raise ValueError(f"kernel: expected {rank or '2 or more'} axes, got {kernel.shape}")
    connectivity, values, index = sparse.values_of(
        kernel, mask, connectivity=options.pop("connectivity", None)
    )
    bias = {"bias": params["bias"]} if "bias" in params else {}
    variables: dict[str, Any] = {"params": {"values": values, **bias}}
    return connectivity, variables if index is None else {
        **variables,
        "connectivity": {"index": index},
    }
