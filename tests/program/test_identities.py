"""An operation that changes nothing changes nothing: every feature that reads a program, behind names,
constraints, barriers, copies, roundings to the same dtype and rematerialisation, at the top of a function
and inside of scans, conditions and functions with gradients of their own. Never in silence: a feature
does what it does without them, or names a leaf.
"""

import warnings
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxprune as jp

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
IDENTITIES = {
    "name": lambda y: checkpoint_name(y, "h"),
    "sharding constraint": lambda y: jax.lax.with_sharding_constraint(y, DEVICE),
    "barrier": jax.lax.optimization_barrier,
    "copy": jnp.copy,
    "reduce_precision": lambda y: jax.lax.reduce_precision(y, 8, 23),
    "remat": lambda y: jax.checkpoint(jnp.copy)(y),
}
ALL = lambda y: reduce(lambda z, same: same(z), IDENTITIES.values(), y)
NONE = lambda y: y
LAYERS, WIDTH, HIDDEN = 2, 4, 6


def block(p, h, same):
    """A residual branch with a normalisation by running statistics in it."""
    y = same(h @ same(p["up"])) + same(p["b"])
    y = jax.nn.relu(same(y)) @ p["mid"]
    y = (same(y) - p["mean"]) * (jax.lax.rsqrt(p["var"] + 1e-5) * same(p["scale"])) + p["bias"]
    return same(h + jax.nn.relu(same(y)) @ p["down"])


def plain(p, x, same):
    return block(p["block"], x, same) @ p["out"]


def scanned(p, x, same):
    step = lambda h, layer: (block(layer, h, same), None)
    return jax.lax.scan(step, x, p["block"])[0] @ p["out"]


def branched(p, x, same):
    other = lambda p, h: 0.5 * block(p, h, same)
    h = jax.lax.cond(x.sum() > -1e9, lambda p, h: block(p, h, same), other, p["block"], x)
    return h @ p["out"]


def with_own_gradient(p, x, same):
    @jax.custom_vjp
    def own(p, h):
        return block(p, h, same)

    own.defvjp(lambda p, h: (own(p, h), None), lambda _, g: (None, g))
    return own(p["block"], x) @ p["out"]


PLACES = {"plain": plain, "scan": scanned, "cond": branched, "custom_vjp": with_own_gradient}
X = jax.random.normal(jax.random.key(9), (8, WIDTH))


def params_of(place):
    shapes = {"up": (WIDTH, HIDDEN), "b": (HIDDEN,), "mid": (HIDDEN, 5), "down": (5, WIDTH)}
    shapes |= dict.fromkeys(("mean", "var", "scale", "bias"), (5,))
    lead = (LAYERS,) if place == "scan" else ()
    own = {
        name: 0.5 * jax.random.normal(jax.random.key(i), (*lead, *shape)) + 0.2
        for i, (name, shape) in enumerate(shapes.items())
    }
    own["var"] = jnp.abs(own["var"]) + 0.5
    return {"block": own, "out": jax.random.normal(jax.random.key(8), (WIDTH, 3))}


def outcome(feature, place, same):
    """What a feature gives, or its error, and what it warns of."""
    fn, params = PLACES[place], params_of(place)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = feature(lambda p, x: fn(p, x, same), params)
        except ValueError as error:
            found = error
    words = [str(w.message) for w in told] + ([str(found)] if isinstance(found, ValueError) else [])
    return found, " ".join(words)


def alike(a, b):
    if isinstance(a, ValueError) or isinstance(b, ValueError):
        return type(a) is type(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    numbers = lambda x: isinstance(x, np.ndarray | jax.Array | float)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.allclose(x, y, atol=1e-5) if numbers(x) else x == y for x, y in pairs
    )


def groups(fn, params):
    graph = jp.trace(fn, params, X)
    return [(g.name, g.size, g.kind) for g in graph.groups], [member for member, _ in graph.frozen]


def layers(fn, params):
    return [x.name for x in jp.structure.layers(jp.trace(fn, params, X))]


def cost(fn, params):
    cost = jp.trace(fn, params, X).cost()
    return cost.macs, float(cost.param_bytes)


def uses(fn, params):
    return [
        (u.kind, u.stacked, u.contracted, u.free) for u in jax.tree.leaves(jp.uses(fn, params, X))
    ]


def folded(fn, params):
    found = jp.calibration.fold_batch_norm(fn, params, X)
    assert np.allclose(fn(found, X), fn(params, X), atol=1e-4)
    return found


def calibrated(fn, params):
    return jp.calibrate(fn, params, [X])


def corrected(fn, params):
    small = jp.quantize_tree(params, bits=2, where="block/up")
    found = jp.calibration.correct_biases(fn, params, small, jp.calibrate(fn, params, [X]), X)
    return {k: v for k, v in found["block"].items() if k != "up"}


def equalized(fn, params):
    return jp.calibration.equalize(fn, params, X)


def compacted(fn, params):
    graph = jp.trace(fn, params, X)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.4)
    compact_fn, small = jp.compact(fn, params, masks, X, fold="mean")
    return compact_fn(small, X), small


def captured(fn, params):
    return jp.distill.capture(fn, params, X, at={"pre": "param:block/b"})


def gated(fn, params):
    gated = jp.gates.attach(fn, params, X)
    return gated(params, gated.init(jax.random.key(0)), X)


def compressed(fn, params):
    run = jp.compressed(fn)
    out = run(jp.quantize_tree(params, where="block/(up|mid)|out"), X)
    return out, sorted((c.path, c.lowering) for c in run.choices)


TRACED = (groups, layers, cost, uses)
RUN = (folded, calibrated, corrected, equalized, compacted, captured, gated, compressed)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("feature", TRACED)
def test_traced_features_see_through_each_identity(feature, place):
    expected, _ = outcome(feature, place, NONE)
    for name, same in IDENTITIES.items():
        found, told = outcome(feature, place, same)
        assert alike(found, expected), (name, found, expected, told)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("feature", RUN)
def test_features_that_run_see_through_all_identities(feature, place):
    expected, said = outcome(feature, place, NONE)
    found, told = outcome(feature, place, ALL)
    assert alike(found, expected), (found, expected, told)
    assert bool(said) == bool(told)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("feature", [folded, corrected, compacted, gated])
def test_no_silence(feature, place):
    """A feature changes something, or names a leaf that it leaves."""
    params = params_of(place)
    found, told = outcome(feature, place, NONE)
    changed = {
        folded: lambda: not np.allclose(found["block"]["mid"], params["block"]["mid"]),
        corrected: lambda: not np.allclose(found["b"], params["block"]["b"]),
        compacted: lambda: found[1]["block"]["b"].shape != params["block"]["b"].shape,
        gated: lambda: len(found[1]) > 0,
    }[feature]
    assert ("block/" in told) if isinstance(found, ValueError) else (changed() or "block/" in told)
