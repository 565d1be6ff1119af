"""What a traced function couples, and what it cannot be."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import jaxprune as jp
import tests.structure._more_networks  # noqa: F401
from tests.structure._zoo import ZOO, build


def test_groups_of_a_transformer():
    fn, params, x = build("transformer")
    sizes = sorted(group.size for group in jp.trace(fn, params, x).groups)
    # per block: 4 heads, 4 query-key dims, 4 value dims, 32 neurons; and the residual stream
    assert sizes == [4] * 6 + [16, 32, 32]


def test_resnet50_has_37_groups():
    class Block(nn.Module):
        n: int
        stride: int = 1

        @nn.compact
        def __call__(self, x):
            norm = lambda: nn.BatchNorm(use_running_average=True)
            y = nn.relu(norm()(nn.Conv(self.n, (1, 1))(x)))
            y = nn.relu(norm()(nn.Conv(self.n, (3, 3), (self.stride, self.stride))(y)))
            y = norm()(nn.Conv(4 * self.n, (1, 1))(y))
            if x.shape != y.shape:
                x = norm()(nn.Conv(4 * self.n, (1, 1), (self.stride, self.stride))(x))
            return nn.relu(x + y)

    class ResNet50(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(64, (7, 7), (2, 2))(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
            for i, count in enumerate((3, 4, 6, 3)):
                for j in range(count):
                    x = Block(64 * 2**i, 2 if i and not j else 1)(x)
            return nn.Dense(1000)(x.mean((1, 2)))

    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(ResNet50().init, jax.random.key(0), x)
    graph = jp.trace(ResNet50().apply, params, x)
    assert len(graph.groups) == 37


def test_functions_that_cannot_be_traced():
    def branching(p, x):
        return x @ p["w"] if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"test_trace.py:\d+ .*x.sum.*jax.lax.cond"):
        jp.trace(branching, {"w": jnp.ones((2, 2))}, jnp.ones((1, 2)))
    with pytest.raises(TypeError, match="missing a required argument: 'x'.*example inputs"):
        jp.trace(branching, {"w": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match="example inputs"):
        jp.compact(branching, {"w": jnp.ones((2, 2))}, {"w": jnp.array(True)})


@pytest.mark.slow
def test_every_axis_is_accounted_for():
    for name in ZOO:
        fn, params, x = build(name)
        graph = jp.trace(fn, params, x)
        named = {m for group in graph.groups for m in group.members} | {m for m, _ in graph.frozen}
        for path, shape in zip(graph.paths, graph.shapes, strict=True):
            assert all((path, axis) in named for axis in range(len(shape))), (name, path)
        assert all(reason for _, reason in graph.frozen)
        assert graph.tabulate(every=True).row_count == len(graph.groups) + len(graph.frozen)
