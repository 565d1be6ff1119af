"""Eight simulated devices, checked shapes, quick compilation, and a cache of it that outlives the run."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

# tests compile much and compute little: without LLVM's optimizations a third of the time is saved
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# the shapes in the annotations of the array maths are checked at run time; the functions that users
# call are left as they are, so that their own error messages can be tested
install_import_hook(
    [
        "jaxprune._bits",
        "jaxprune.distill._reduce",
        "jaxprune.distill._softmax",
        "jaxprune.masks._keys",
        "jaxprune.masks._search",
        "jaxprune.masks._select",
        "jaxprune.optim._clustered",
        "jaxprune.quantize._scale",
        "jaxprune.reconstruct",
        "jaxprune.scores._weights",
        "jaxprune.share._vectors",
        "jaxprune.sparse._tiles",
    ],
    "beartype.beartype",
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402
from flax.core import FrozenDict  # noqa: E402

jax.config.update(
    "jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / jax.__version__)
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


_held = [0]  # bytes, after the last time that compiled functions were forgotten


def _resident():
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.fixture(autouse=True)
def _bounded_memory():
    """Compiled functions of former tests help few later ones, and would hold gigabytes in the end."""
    yield
    if _resident() > max(1.2e9, _held[0] + 0.3e9):
        jax.clear_caches()
        gc.collect()
        _trim()
        _held[0] = _resident()


def _trim():
    """Hands freed memory back, which the allocator of glibc would keep in pieces."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture
def params():
    """A small tree with matrices, a convolution kernel and vectors."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    return {
        "conv": {"kernel": jax.random.normal(next(keys), (3, 3, 4, 8)), "bias": jnp.zeros(8)},
        "dense": {"kernel": jax.random.normal(next(keys), (16, 10)), "bias": jnp.ones(10)},
        "embed": jax.random.normal(next(keys), (7, 5)),
    }


def nnx_state(tree):
    """An `nnx.State` that holds the arrays of a nested dict."""
    from flax import nnx

    return nnx.State(jax.tree.map(nnx.Param, tree))


CONTAINERS = {"dict": lambda tree: tree, "FrozenDict": FrozenDict, "nnx.State": nnx_state}


@pytest.fixture(params=list(CONTAINERS))
def container(request):
    """Each kind of tree that users hold parameters in."""
    return CONTAINERS[request.param]
