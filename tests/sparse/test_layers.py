"""Kernels of fixed connectivity, and the layers of linen and nnx that have them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.structure._zoo import normal

KINDS = {
    "random": jp.sparse.RandomEntries(0.7),
    "n:m": jp.sparse.RandomNM(1, 4),
    "diagonal": jp.sparse.block_diagonal(4),
    "butterfly": jp.sparse.butterfly(8),
    "tiles": jp.sparse.Tiles(8, ((0, 3), (7, 2), (3, 1), (5, 4))),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
KEY = jax.random.key(3)


def kernel_of(kind, shape=(16, 24)):
    index = KINDS[kind].draw(KEY, shape)
    values = normal(*KINDS[kind].values_shape(shape))
    return KINDS[kind], values, index, KINDS[kind].dense(values, index, shape)


@each_kind
@pytest.mark.parametrize("shape", [(16, 24), (3, 16, 8)])
def test_values_and_kernels_are_inverses(kind, shape):
    connectivity, values, index, kernel = kernel_of(kind, shape)
    assert kernel.shape == shape
    assert values.size == np.count_nonzero(kernel)
    np.testing.assert_array_equal(connectivity.take(kernel, index), values)
    np.testing.assert_array_equal(connectivity.take(kernel + (kernel == 0), index), values)
    found = connectivity.index_of(kernel != 0)
    np.testing.assert_array_equal(connectivity.dense(values, found, shape), kernel)
    one, two = (connectivity.draw(jax.random.key(i), shape) for i in (0, 1))
    assert (one is None) == (two is None)
    assert one is None or bool((one != two).any())


@each_kind
def test_products_equal_the_dense_ones_with_their_gradients(kind):
    connectivity, values, index, kernel = kernel_of(kind)
    x, target = normal(2, 5, 16), normal(2, 5, 24, seed=1)

    @jax.jit
    def sparse(x, values):
        y = jp.sparse.sparse_dot(x, values, index, connectivity, 24)
        return jnp.sum((y - target) ** 2), y

    dense = lambda x, kernel: (jnp.sum((x @ kernel - target) ** 2), x @ kernel)
    found = jax.value_and_grad(sparse, (0, 1), has_aux=True)(x, values)
    wanted = jax.value_and_grad(dense, (0, 1), has_aux=True)(x, kernel)
    np.testing.assert_allclose(found[0][1], wanted[0][1], atol=1e-4)
    np.testing.assert_allclose(found[1][0], wanted[1][0], atol=1e-3)
    np.testing.assert_allclose(
        found[1][1], connectivity.take(wanted[1][1], index), atol=1e-3, rtol=1e-4
    )


@each_kind
def test_rows_equal_those_of_the_dense_table(kind):
    connectivity, values, index, kernel = kernel_of(kind)
    ids = jnp.array([[0, 23, 5], [-1, -20, 30]])
    found = jp.sparse.sparse_take(ids, values, index, connectivity, (16, 24))
    np.testing.assert_allclose(found, jnp.take(kernel.T, ids, axis=0), atol=1e-6)
    assert bool(jnp.isnan(found[1, 2]).all())


CONVS = [
    {},
    {"strides": (2, 1), "padding": "VALID"},
    {"padding": ((2, 0), (1, 1)), "kernel_dilation": 2},
    {"padding": 1, "input_dilation": (2, 1)},
]


@each_kind
@pytest.mark.parametrize("options", CONVS)
def test_convolutions_equal_those_of_linen_and_nnx(kind, options):
    x = normal(2, 6, 5, 16)
    layer = jp.linen.SparseConv(8, (3, 2), KINDS[kind], **options)
    variables = layer.init(KEY, x)
    dense = nn.Conv(8, (3, 2), **options)
    wanted = dense.apply({"params": layer.to_dense(variables, 16)}, x)
    np.testing.assert_allclose(layer.apply(variables, x), wanted, atol=1e-4)
    # one image without a batch axis, and two batch axes
    np.testing.assert_allclose(layer.apply(variables, x[0]), wanted[0], atol=1e-4)
    np.testing.assert_allclose(layer.apply(variables, x[None]), wanted[None], atol=1e-4)
    twin = jp.nnx.SparseConv(16, 8, (3, 2), KINDS[kind], **options, rngs=nnx.Rngs(0))
    carry(variables, twin)
    np.testing.assert_allclose(twin(x), wanted, atol=1e-4)
    np.testing.assert_allclose(twin.to_dense()(x), wanted, atol=1e-4)


def carry(variables, module):
    """Variables of linen, given to the same module of nnx by their names."""
    pure = {**variables["params"], **variables.get("connectivity", {})}
    state = nnx.state(module, (nnx.Param, jp.nnx.ConnectivityIndex))
    assert set(state) == set(pure)
    for name, value in pure.items():
        assert getattr(module, name)[...].shape == value.shape
        getattr(module, name)[...] = value


@each_kind
def test_dense_layers_and_tables_of_linen_and_nnx_are_equal(kind):
    x = normal(3, 16)
    layer = jp.linen.SparseDense(24, KINDS[kind])
    variables = layer.init(KEY, x)
    wanted = nn.Dense(24).apply({"params": layer.to_dense(variables, 16)}, x)
    twin = jp.nnx.SparseDense(16, 24, KINDS[kind], rngs=nnx.Rngs(0))
    carry(variables, twin)
    for found in (layer.apply(variables, x), twin(x), twin.to_dense()(x)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    ids = jnp.array([1, 23])
    table = jp.linen.SparseEmbed(24, 16, KINDS[kind])
    variables = table.init(KEY, ids)
    twin = jp.nnx.SparseEmbed(24, 16, KINDS[kind], rngs=nnx.Rngs(0))
    carry(variables, twin)
    dense = nn.Embed(24, 16)
    params = {"params": table.to_dense(variables)}
    for found in (table.apply(variables, ids), twin(ids), twin.to_dense()(ids)):
        np.testing.assert_allclose(found, dense.apply(params, ids), atol=1e-5)
    wanted = dense.apply(params, x, method="attend")
    for found in (table.apply(variables, x, method="attend"), twin.attend(x)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@each_kind
def test_from_a_mask_and_back(kind):
    connectivity, _, _, pattern = kernel_of(kind)
    mask, kernel, x = pattern != 0, normal(16, 24, seed=4), normal(3, 16)
    params = {"kernel": kernel, "bias": normal(24)}
    masked = {**params, "kernel": kernel * mask}
    for held in (None, connectivity):
        options = {} if held is None else {"connectivity": held}
        layer, variables = jp.linen.SparseDense.from_mask(params, mask, **options)
        np.testing.assert_array_equal(layer.to_dense(variables, 16)["kernel"], masked["kernel"])
        np.testing.assert_allclose(
            layer.apply(variables, x), nn.Dense(24).apply({"params": masked}, x), atol=1e-5
        )
        dense = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
        dense.kernel[...] = kernel
        twin = jp.nnx.SparseDense.from_mask(dense, mask, connectivity=held)
        np.testing.assert_array_equal(twin.dense_kernel(), masked["kernel"])
        table, variables = jp.linen.SparseEmbed.from_mask(
            {"embedding": kernel.T}, mask.T, **options
        )
        np.testing.assert_array_equal(table.to_dense(variables)["embedding"], masked["kernel"].T)
        embed = nnx.Embed(24, 16, rngs=nnx.Rngs(0))
        embed.embedding[...] = kernel.T
        found = jp.nnx.SparseEmbed.from_mask(embed, mask.T, connectivity=held).to_dense()
        np.testing.assert_array_equal(found.embedding[...], masked["kernel"].T)


def test_convolutions_from_a_mask_keep_their_options():
    x = normal(2, 6, 6, 8)
    dense = nnx.Conv(8, 4, (3, 3), strides=2, padding="VALID", use_bias=False, rngs=nnx.Rngs(0))
    mask = normal(3, 3, 8, 4, seed=2) > 0
    layer = jp.nnx.SparseConv.from_mask(dense, mask)
    params = {"kernel": dense.kernel[...]}
    twin, variables = jp.linen.SparseConv.from_mask(params, mask, strides=2, padding="VALID")
    dense.kernel[...] = jnp.where(mask, dense.kernel[...], 0)
    assert layer.bias is None
    assert not twin.use_bias
    for found in (layer(x), twin.apply(variables, x), layer.to_dense()(x)):
        np.testing.assert_allclose(found, dense(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "n:m"])
def test_training_holds_the_values_alone(kind):
    x, y = normal(32, 16), normal(32, 24, seed=1)
    layer = jp.linen.SparseDense(24, KINDS[kind])
    variables = layer.init(KEY, x)
    params, index = variables["params"], variables["connectivity"]
    before = layer.to_dense(variables, 16)["kernel"]
    tx = optax.adam(0.01)

    def loss(params):
        return jnp.mean((layer.apply({"params": params, "connectivity": index}, x) - y) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    assert state[0].mu["values"].size == np.count_nonzero(before) < 16 * 24 // 2
    for _ in range(5):
        params, state, value = step(params, state)
        losses.append(value)
    assert losses[-1] < losses[0]
    after = layer.to_dense({"params": params, "connectivity": index}, 16)["kernel"]
    np.testing.assert_array_equal(after != 0, before != 0)

    model = jp.nnx.SparseDense(16, 24, KINDS[kind], rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    kept, places = model.dense_kernel() != 0, model.index[...]

    @nnx.jit
    def train(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        assert set(grads) == {"values", "bias"}
        optimizer.update(model, grads)
        return value

    first = train(model, optimizer)
    assert train(model, optimizer) < first
    np.testing.assert_array_equal(model.index[...], places)
    np.testing.assert_array_equal(model.dense_kernel() != 0, kept)


@each_kind
@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_start_with_the_scale_of_a_dense_layer(kind, transposed):
    init = jax.nn.initializers.lecun_normal()
    if transposed:
        init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
    shape = (256, 320)
    index = KINDS[kind].draw(KEY, shape)
    values = jp.sparse.initial_values(init, KEY, KINDS[kind], index, shape, transposed=transposed)
    kernel = KINDS[kind].dense(values, index, shape)
    # of x of variance 1, every output has variance 1; on average over 256 kept or more of them
    assert abs(float(jnp.mean(jnp.sum(kernel**2, 0))) - 1) < 0.05


def test_each_output_has_the_scale_of_its_own_connections():
    mask = jnp.arange(64)[:, None] < jnp.array([2, 64] * 50)
    held, _, index = jp.sparse.values_of(jnp.ones((64, 100)), mask)
    init = jax.nn.initializers.lecun_normal()
    values = jp.sparse.initial_values(init, KEY, held, index, (64, 100))
    power = jnp.sum(held.dense(values, index, (64, 100)) ** 2, 0)
    assert abs(float(power[::2].mean()) - 1) < 0.3
    assert abs(float(power[1::2].mean()) - 1) < 0.1


@pytest.mark.parametrize("kind", ["random", "butterfly"])
def test_layers_scan_remat_and_map(kind):
    x = normal(4, 16)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(jp.linen.SparseDense(16, KINDS[kind])(x)), None

    axes = {"params": 0, "connectivity": 0}
    stack = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs={"params": True}, length=3)()
    variables = stack.init(KEY, x, None)
    found, _ = jax.jit(stack.apply)(variables, x, None)
    wanted = x
    for i in range(3):
        one = jax.tree.map(lambda v, i=i: v[i], variables)
        wanted, _ = Layer().apply(one, wanted, None)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    loss = lambda p: stack.apply({**variables, "params": p}, x, None)[0].sum()
    grads = jax.grad(loss)(variables["params"])
    assert all(bool(jnp.isfinite(g).all() & (g != 0).any()) for g in jax.tree.leaves(grads))

    make = lambda key: jp.nnx.SparseDense(16, 16, KINDS[kind], rngs=nnx.Rngs(key))
    many = nnx.vmap(make)(jax.random.split(KEY, 3))
    ys = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(many, x)
    graph, state = nnx.split(many)
    for i in range(3):
        one = nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i], state))
        np.testing.assert_allclose(ys[i], x @ one.dense_kernel(), atol=1e-5)


@each_kind
def test_sharded_values_and_rows(kind):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    connectivity, values, index, kernel = kernel_of(kind, (32, 32))
    axis = next((i for i, n in enumerate(values.shape) if n % 8 == 0), None)
    spec = () if axis is None else (None,) * axis + ("d",)
    x = normal(8, 32)
    dot = jax.jit(lambda x, v: jp.sparse.sparse_dot(x, v, index, connectivity, 32))
    for rows in ((), ("d",)):
        found = dot(place(x, *rows), place(values, *spec))
        np.testing.assert_allclose(found, x @ kernel, atol=1e-4)


@each_kind
def test_dtypes_are_those_of_flax(kind):
    x = normal(3, 16)
    layer = jp.linen.SparseDense(24, KINDS[kind], dtype=jnp.bfloat16)
    variables = layer.init(KEY, x)
    assert variables["params"]["values"].dtype == jnp.float32
    assert layer.apply(variables, x).dtype == jnp.bfloat16
    half = jp.nnx.SparseDense(
        16, 24, KINDS[kind], param_dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(0)
    )
    assert half.values[...].dtype == jnp.bfloat16
    assert half(x).dtype == jnp.float32
    y = half(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert half.bias is None
    wanted = x @ half.dense_kernel().astype(jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), wanted, atol=0.1)
    ids = jp.nnx.SparseEmbed(24, 16, KINDS[kind], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert ids(jnp.array([1])).dtype == jnp.bfloat16


def fails(match, fn, error=ValueError):
    with pytest.raises(error, match=match):
        fn()


def test_errors_say_what_does_not_fit():
    linen, shape, s = jp.linen.SparseDense, (10, 12), jp.sparse
    fails("do not divide 10 inputs", lambda: s.RandomNM(2, 4).values_shape(shape))
    fails("n <= m", lambda: s.RandomNM(5, 4).values_shape(shape))
    fails("blocks: 4 do not divide 10 inputs", lambda: s.block_diagonal(4).values_shape(shape))
    fails("power of two", lambda: s.butterfly(6))
    fails("different blocks", lambda: s.Tiles(2, ((0, 0),)).values_shape(shape))
    fails(r"blocks in \[0, 2\)", lambda: s.Tiles(2, ((0, 3),)).values_shape(shape))
    fails("sparsity", lambda: s.RandomEntries(1.5).values_shape(shape))
    fails("count: expected at most 120", lambda: s.FixedEntries(121, shape).values_shape(shape))
    fails("of a kernel of", lambda: s.FixedEntries(4, shape).values_shape((12, 10)))
    fails("expected 2 of every 4", lambda: s.RandomNM(2, 4).index_of(jnp.ones((8, 2), bool)))
    fails("leave connectivity= out", lambda: s.block_diagonal(2).index_of(jnp.ones((8, 2), bool)))
    fails(
        "6 kept weights, got 8", lambda: s.FixedEntries(6, (8, 1)).index_of(jnp.ones((8, 1), bool))
    )
    fails("mask", lambda: s.values_of(jnp.ones((4, 4)), jnp.ones((3, 4), bool)))
    x = normal(2, 16)
    layer = linen(24, KINDS["random"])
    variables = layer.init(KEY, x)
    fails("pass all that init returned", lambda: layer.apply({"params": variables["params"]}, x))
    fails("values", lambda: layer.to_dense(variables, 8))
    fails("expected 16 inputs", lambda: kept(KINDS["diagonal"])(normal(2, 20)))
    fails(
        "padding",
        lambda: jp.linen.SparseConv(8, (3,), KINDS["n:m"], padding="CIRCULAR").init(KEY, x),
    )
    fails("axes of space", lambda: jp.linen.SparseConv(8, (3, 3), KINDS["n:m"]).init(KEY, x[0]))
    fails("integers", lambda: jp.linen.SparseEmbed(24, 16, KINDS["n:m"]).init(KEY, x), TypeError)
    fails("another width", lambda: layer.apply(variables, normal(2, 20)))
    grouped = nnx.Conv(8, 8, (3,), feature_group_count=2, rngs=nnx.Rngs(0))
    fails("block_diagonal", lambda: jp.nnx.SparseConv.from_mask(grouped, jnp.ones((3, 4, 8), bool)))


def kept(connectivity):
    return jp.nnx.SparseDense(16, 24, connectivity, rngs=nnx.Rngs(0))
