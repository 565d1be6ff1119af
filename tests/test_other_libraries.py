"""Models of Equinox and Haiku, as their users write them, through the pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

eqx = pytest.importorskip("equinox")
hk = pytest.importorskip("haiku")

WIDTH, VOCABULARY = 16, 30
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, 6)))


class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    norm2: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.norm, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(4, WIDTH, key=first)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 32, 1, activation=jax.nn.gelu, key=second)

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class Decoder(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.blocks = [Block(key) for key in keys[1:3]]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[3])

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def equinox():
    model = Decoder(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    return (lambda params, t: jax.vmap(eqx.combine(params, static))(t)), params


def haiku():
    def network(tokens):
        x = hk.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(2):
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(4, 4, w_init_scale=1.0, model_size=WIDTH)(h, h, h)
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.nets.MLP([32, WIDTH], activation=jax.nn.gelu)(h)
        return hk.Linear(VOCABULARY)(hk.RMSNorm(-1)(x))

    module = hk.without_apply_rng(hk.transform(network))
    return module.apply, module.init(jax.random.key(0), TOKENS)


def random_like(params):
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda w: w + 0.3 * jax.random.normal(next(keys), w.shape), params)


@pytest.mark.parametrize("library", [equinox, haiku])
def test_structure_masks_quantization(library):
    fn, params = library()
    params = random_like(params)
    graph = jp.trace(fn, params, TOKENS)
    members = {path for group in graph.groups for path, _ in group.members}
    sizes = dict(zip(graph.paths, (np.prod(s) for s in graph.shapes), strict=True))
    assert sum(sizes[path] for path in members) > 0.95 * sum(sizes.values())
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.4, scope="leaf")
    small_fn, small = jp.compact(fn, params, masks, TOKENS, verify=True)
    assert jp.nbytes(small) < 0.5 * jp.nbytes(params)
    assert jax.tree.structure(small) == jax.tree.structure(params)

    tx = jp.masked_update(optax.adam(1e-2), masks)
    state = tx.init(params)
    loss = lambda p: jnp.mean(jnp.square(fn(p, TOKENS)))
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert not any(jax.tree.leaves(jp.optim.check(state, params)))

    tree = jp.quantize_tree(params, bits=8, uses=graph)
    found = jax.jit(jp.compressed(fn))(tree, TOKENS)
    expected = fn(jp.dequantize_tree(tree), TOKENS)
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


def test_modules_with_functions_among_their_leaves_are_refused():
    model = Decoder(jax.random.key(0))
    with pytest.raises(TypeError, match=r"'blocks/0/mlp/activation' is a .*eqx.partition"):
        jp.trace(lambda m, t: jax.vmap(m)(t), model, TOKENS)
