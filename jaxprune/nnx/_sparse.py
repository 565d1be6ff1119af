"""Layers of fixed connectivity for `flax.nnx`: weights that do not exist are no parameters.

Parameters are `values`, compact, and `bias`, as in `jp.linen`. Where the weights are, if the shape alone
does not say it, is the variable `index`, a `ConnectivityIndex` and no `nnx.Param`: `nnx.grad` and
`nnx.Optimizer(…, wrt=nnx.Param)` leave it alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from jaxtyping import Array, Bool, Float, Int

from jaxprune import sparse

Initializer = Callable[..., Array]
_KERNEL = initializers.lecun_normal()
_BIAS = initializers.zeros_init()
_EMBED = initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class ConnectivityIndex(nnx.Variable):
    """Where the weights of a sparse layer are: integers, constant, not trained.

    Example:
      >>> from flax import nnx
      >>> layer = jp.nnx.SparseDense(8, 4, jp.sparse.RandomEntries(0.5), rngs=nnx.Rngs(0))
      >>> index, params = nnx.state(layer, jp.nnx.ConnectivityIndex), nnx.state(layer, nnx.Param)
      >>> list(index), sorted(params)
      (['index'], ['bias', 'values'])
    """


class _Sparse(nnx.Module):
    """What layers of fixed connectivity share: their variables."""

    def _make(
        self,
        shape: tuple[int, ...],
        connectivity: sparse.Connectivity,
        init: Initializer,
        dtype: Any,
        rngs: nnx.Rngs,
        *,
        transposed: bool = False,
    ) -> None:
        connectivity.values_shape(shape)
        index = connectivity.draw(rngs.params(), shape)
        values = sparse.initial_values(
            init, rngs.params(), connectivity, index, shape, dtype=dtype, transposed=transposed
        )
        self._set(values, index)
        self.connectivity, self.shape = connectivity, shape

    def _set(self, values: Array, index: Array | None) -> None:
        self.values = nnx.Param(values)
        self.index = None if index is None else ConnectivityIndex(index)

    def _taking(self, values: Array, index: Array | None, bias: Any) -> Any:
        """This layer with the weights of another, and the bias of a dense one."""
        self._set(values, index)
        self.bias = None if bias is None else nnx.Param(bias[...])
        return self

    def _held(self) -> tuple[Array, Array | None]:
        return self.values[...], None if self.index is None else self.index[...]

    def dense_kernel(self) -> Array:
        """The dense kernel, zeros where no weight exists."""
        return self.connectivity.dense(*self._held(), self.shape)


class SparseDense(_Sparse):
    """A dense layer of which only some weights exist; see `jp.linen.SparseDense`.

    Example:
      >>> from flax import nnx
      >>> layer = jp.nnx.SparseDense(8, 6, jp.sparse.block_diagonal(2), rngs=nnx.Rngs(0))
      >>> x = jnp.arange(8.0)
      >>> layer.values.shape, bool(jnp.allclose(layer(x), x @ layer.dense_kernel(), atol=1e-5))
      ((2, 4, 3), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        connectivity: sparse.Connectivity,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = _KERNEL,
        bias_init: Initializer = _BIAS,
        rngs: nnx.Rngs,
    ) -> None:
        """From `in_features` to `out_features`."""
        self._make((in_features, out_features), connectivity, kernel_init, param_dtype, rngs)
        self.bias = _bias(use_bias, bias_init, out_features, param_dtype, rngs)
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows features"]:
        """(rows…, features)."""
        _check_inputs(x, self.shape)
        values, index = self._held()
        x, values, bias = _promoted(self, x, values)
        y = sparse.sparse_dot(
            x, values, index, self.connectivity, self.shape[-1], precision=self.precision
        )
        return y if bias is None else y + bias

    def to_dense(self) -> nnx.Linear:
        """An `nnx.Linear` that gives the same. Inverse: `from_mask`."""
        dense = nnx.Linear(
            *self.shape,
            use_bias=self.bias is not None,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            rngs=nnx.Rngs(0),
        )
        return _filled(dense, self.dense_kernel(), self.bias)

    @classmethod
    def from_mask(
        cls,
        dense: nnx.Linear,
        mask: Bool[Array, "inputs features"],
        *,
        connectivity: sparse.Connectivity | None = None,
    ) -> "SparseDense":
        """From an `nnx.Linear` and a mask; `connectivity` says how the weights are held.

        Example:
          >>> from flax import nnx
          >>> dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
          >>> layer = jp.nnx.SparseDense.from_mask(dense, dense.kernel[...] > 0)
          >>> layer(jnp.ones((2, 4))).shape
          (2, 4)
        """
        kernel = dense.kernel[...]
        connectivity, values, index = sparse.values_of(kernel, mask, connectivity=connectivity)
        layer = cls(
            *kernel.shape,
            connectivity,
            use_bias=dense.bias is not None,
            dtype=dense.dtype,
            param_dtype=dense.param_dtype,
            precision=dense.precision,
            kernel_init=initializers.zeros_init(),
            rngs=nnx.Rngs(0),
        )
        return layer._taking(values, index, dense.bias)


class SparseConv(_Sparse):
    """A convolution of which only some weights exist; see `jp.linen.SparseConv`.

    Example:
      >>> from flax import nnx
      >>> layer = jp.nnx.SparseConv(4, 8, (3, 3), jp.sparse.RandomNM(2, 4), rngs=nnx.Rngs(0))
      >>> layer.values.shape, layer(jnp.ones((1, 5, 5, 4))).shape
      ((3, 3, 2, 8), (1, 5, 5, 8))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        connectivity: sparse.Connectivity,
        *,
        strides: int | Sequence[int] = 1,
        padding: Any = "SAME",
        input_dilation: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = _KERNEL,
        bias_init: Initializer = _BIAS,
        rngs: nnx.Rngs,
    ) -> None:
        """From `in_features` channels to `out_features`."""
        shape = (*kernel_size, in_features, out_features)
        self._make(shape, connectivity, kernel_init, param_dtype, rngs)
        self.bias = _bias(use_bias, bias_init, out_features, param_dtype, rngs)
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.strides, self.padding = _static(strides), _static(padding)
        self.input_dilation = _static(input_dilation)
        self.kernel_dilation = _static(kernel_dilation)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*out features"]:
        """(batch…, space…, features)."""
        _check_inputs(x, self.shape)
        values, index = self._held()
        x, values, bias = _promoted(self, x, values)
        y = sparse.sparse_conv(
            x,
            values,
            index,
            self.connectivity,
            self.shape,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            precision=self.precision,
        )
        return y if bias is None else y + bias

    def to_dense(self) -> nnx.Conv:
        """An `nnx.Conv` that gives the same. Inverse: `from_mask`."""
        *window, inputs, outputs = self.shape
        dense = nnx.Conv(
            inputs,
            outputs,
            tuple(window),
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            use_bias=self.bias is not None,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            rngs=nnx.Rngs(0),
        )
        return _filled(dense, self.dense_kernel(), self.bias)

    @classmethod
    def from_mask(
        cls,
        dense: nnx.Conv,
        mask: Bool[Array, "*window inputs features"],
        *,
        connectivity: sparse.Connectivity | None = None,
    ) -> "SparseConv":
        """From an `nnx.Conv` without groups and a mask; `connectivity` says how weights are held."""
        if dense.feature_group_count != 1:
            raise ValueError(
                f"feature_group_count: expected 1, got {dense.feature_group_count}; build the layer "
                "with jp.sparse.block_diagonal for groups"
            )
        kernel = dense.kernel[...]
        connectivity, values, index = sparse.values_of(kernel, mask, connectivity=connectivity)
        *window, inputs, outputs = kernel.shape
        layer = cls(
            inputs,
            outputs,
            window,
            connectivity,
            strides=dense.strides or 1,
            padding=dense.padding,
            input_dilation=dense.input_dilation or 1,
            kernel_dilation=dense.kernel_dilation or 1,
            use_bias=dense.bias is not None,
            dtype=dense.dtype,
            param_dtype=dense.param_dtype,
            precision=dense.precision,
            kernel_init=initializers.zeros_init(),
            rngs=nnx.Rngs(0),
        )
        return layer._taking(values, index, dense.bias)


class SparseEmbed(_Sparse):
    """A table of which only some entries exist; see `jp.linen.SparseEmbed`.

    Example:
      >>> from flax import nnx
      >>> layer = jp.nnx.SparseEmbed(10, 8, jp.sparse.RandomNM(2, 4), rngs=nnx.Rngs(0))
      >>> row = layer(jnp.array([3]))
      >>> row.shape, int((row != 0).sum())
      ((1, 8), 4)
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        connectivity: sparse.Connectivity,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: Initializer = _EMBED,
        rngs: nnx.Rngs,
    ) -> None:
        """A table of (num_embeddings, features)."""
        shape = (features, num_embeddings)
        self._make(shape, connectivity, embedding_init, param_dtype, rngs, transposed=True)
        self.dtype, self.param_dtype = dtype, param_dtype

    def __call__(self, inputs: Int[Array, "*ids"]) -> Float[Array, "*ids features"]:
        """Rows of the table."""
        values, index = self._held()
        (values,) = dtypes.promote_dtype((values,), dtype=self.dtype, inexact=False)
        features, tokens = self.shape
        return sparse.sparse_take(inputs, values, index, self.connectivity, (features, tokens))

    def attend(self, query: Float[Array, "*rows features"]) -> Float[Array, "*rows tokens"]:
        """Products with every row: logits, where the table is that of the outputs too."""
        _check_inputs(query, self.shape)
        values, index = self._held()
        query, values = dtypes.promote_dtype((query, values), dtype=self.dtype)
        return sparse.sparse_dot(query, values, index, self.connectivity, self.shape[-1])

    def to_dense(self) -> nnx.Embed:
        """An `nnx.Embed` that gives the same. Inverse: `from_mask`."""
        features, tokens = self.shape
        options = {"dtype": self.dtype} if self.dtype is not None else {}
        dense = nnx.Embed(
            tokens, features, param_dtype=self.param_dtype, rngs=nnx.Rngs(0), **options
        )
        dense.embedding = nnx.Param(self.dense_kernel().T)
        return dense

    @classmethod
    def from_mask(
        cls,
        dense: nnx.Embed,
        mask: Bool[Array, "tokens features"],
        *,
        connectivity: sparse.Connectivity | None = None,
    ) -> "SparseEmbed":
        """From an `nnx.Embed` and a mask of its table; `connectivity` says how entries are held."""
        table = dense.embedding[...]
        mask = jnp.broadcast_to(mask, table.shape)
        connectivity, values, index = sparse.values_of(table.T, mask.T, connectivity=connectivity)
        layer = cls(
            *table.shape,
            connectivity,
            dtype=dense.dtype,
            param_dtype=dense.param_dtype,
            embedding_init=initializers.zeros_init(),
            rngs=nnx.Rngs(0),
        )
        layer._set(values, index)
        return layer


def _bias(
    use_bias: bool, init: Initializer, features: int, dtype: Any, rngs: nnx.Rngs
) -> nnx.Param | None:
    return nnx.Param(init(rngs.params(), (features,), dtype)) if use_bias else None


def _promoted(layer: Any, x: Array, values: Array) -> tuple[Array, Array, Array | None]:
    bias = None if layer.bias is None else layer.bias[...]
    return dtypes.promote_dtype((x, values, bias), dtype=layer.dtype)


def _check_inputs(x: Array, shape: tuple[int, ...]) -> None:
    if jnp.shape(x)[-1] != shape[-2]:
        raise ValueError(f"x: expected {shape[-2]} inputs in the last axis, got {jnp.shape(x)}")


def _static(x: Any) -> Any:
    """Lists as tuples, which NNX keeps in the graph definition."""
    return tuple(map(_static, x)) if isinstance(x, list | tuple) else x


def _filled(dense: Any, kernel: Array, bias: Any) -> Any:
    dense.kernel = nnx.Param(kernel)
    if bias is not None:
        dense.bias = nnx.Param(bias[...])
    return dense
