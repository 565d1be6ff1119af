"""Losses against formulas written out in NumPy, their gradients, and what all losses share."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import distill as d

RNG = np.random.default_rng(0)


def f(*shape):
    return RNG.normal(size=shape).astype(np.float32)


S, T, LABELS = f(6, 10), f(6, 10), np.random.default_rng(1).integers(0, 10, 6)
A, B = f(4, 5, 5, 8), f(4, 5, 5, 8)
WIDE, WIDE_T = f(4, 10, 10, 6), f(4, 10, 10, 6)
HIDDEN, HIDDEN_T = f(2, 5, 12), f(2, 5, 12)


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def unit(x, axis, order=2):
    return x / np.linalg.norm(x, order, axis, keepdims=True)


def huber(x):
    return np.where(np.abs(x) < 1, 0.5 * x * x, np.abs(x) - 0.5)


def np_kd(s, t, T=3.0):
    return T * T * kl(softmax(t / T), softmax(s / T)).mean()


def np_labels(s, t, T=3.0, alpha=0.3):
    hard = -np.log(softmax(s)[np.arange(6), LABELS]).mean()
    return alpha * hard + (1 - alpha) * np_kd(s, t, T)


def np_dkd(s, t, T=2.0, alpha=0.7, beta=5.0):
    total = 0
    for i, c in enumerate(LABELS):
        p, q = softmax(t[i] / T), softmax(s[i] / T)
        rest = np.arange(10) != c
        tckd = kl(np.array([p[c], 1 - p[c]]), np.array([q[c], 1 - q[c]]))
        nckd = kl(softmax(t[i][rest] / T), softmax(s[i][rest] / T))
        total += T * T * (alpha * tckd + beta * nckd)
    return total / 6


def np_dist(s, t, T=2.0):
    p, q = softmax(s / T), softmax(t / T)
    r = lambda a, b: np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])
    return T * T * (1 - r(p, q) + 1 - r(p.T, q.T))


def np_logit_std(s, t, T=2.0):
    z = lambda x: (x - x.mean(1, keepdims=True)) / (1e-7 + x.std(1, ddof=1, keepdims=True))
    return np_kd(z(s), z(t), T)


def np_at(s, t):
    m = lambda x: unit((x**2).mean(-1).reshape(4, -1), 1)
    return ((m(s) - m(t)) ** 2).mean()


def np_fsp(a, b, c, e):
    pool = lambda x: x.reshape(4, 5, 2, 5, 2, -1).max((2, 4))
    g = lambda x, y: np.einsum("bhwi,bhwj->bij", pool(x), y) / 25
    return np.linalg.norm(g(a, b) - g(c, e), axis=1).sum() / 4


def np_nst(s, t):
    s, t = (unit(x.reshape(4, 25, 8), 1) for x in (s, t))
    k = lambda x, y: np.mean(np.einsum("bpi,bpj->bij", x, y) ** 2)
    return k(s, s) + k(t, t) - 2 * k(s, t)


def np_pkt(s, t, eps=1e-7):
    def p(x):
        x = x / (np.linalg.norm(x, axis=1, keepdims=True) + eps)
        k = (x @ x.T + 1) / 2
        return k / k.sum(1, keepdims=True)

    return np.mean(p(t) * np.log((p(t) + eps) / (p(s) + eps)))


def np_sp(s, t):
    g = lambda x: unit(x @ x.T, 1, 1)
    return ((g(s) - g(t)) ** 2).sum() / 36


def np_ickd(s, t):
    g = lambda x: unit(np.einsum("bpi,bpj->bij", x.reshape(4, 25, 8), x.reshape(4, 25, 8)), 2)
    return ((g(s) - g(t)) ** 2).sum() / (8 * 16)


def np_affinity(s, t):
    s, t = (unit(x.reshape(4, 25, 8), 1) for x in (s, t))
    outer = lambda x: np.einsum("bpc,bqc->bcpq", x, x) / 25
    return np.linalg.norm(outer(s) - outer(t), axis=(2, 3)).sum(1).mean()


def np_rkd_d(s, t):
    def m(x):
        r = np.linalg.norm(x[:, None] - x[None], axis=2)
        return r / r[r > 0].mean()

    return huber(m(s) - m(t)).mean()


def np_rkd_a(s, t):
    def m(x):
        e = x[None] - x[:, None]
        n = np.linalg.norm(e, axis=2, keepdims=True)
        e = e / np.where(n > 0, n, 1)
        return np.einsum("ijd,ikd->ijk", e, e)

    return huber(m(s) - m(t)).mean()


def np_cckd(s, t, gamma=0.4):
    def m(x):
        k = x @ x.T
        return math.exp(-2 * gamma) * sum(
            (2 * gamma) ** p / math.factorial(p) * k**p for p in range(3)
        )

    return np.linalg.norm(m(s) - m(t)) / 36


def np_ab(s, t, m=1.0):
    low = ((s > -m) & (t <= 0)) * (s + m) ** 2
    high = ((s <= m) & (t > 0)) * (s - m) ** 2
    return (low + high).sum() / len(s)


def np_ft(s, t):
    return np.abs(unit(s, 1) - unit(t, 1)).mean()


def np_srd(a, x, b, y):
    return 2 * np.log((np.abs(a - b) ** 4).sum()) + np_kd(x, y, 2.0) / 4


def np_info(s, t, T=0.5):
    p = softmax(unit(s, 1) @ unit(t, 1).T / T)
    return -np.log(np.diag(p)).mean()


def np_cka(s, t):
    s, t = s - s.mean(0), t - t.mean(0)
    n = lambda x: np.square(x).sum()
    return 1 - n(s.T @ t) / np.sqrt(n(s.T @ s) * n(t.T @ t))


def np_relation(s, t, heads=3):
    def r(x):
        x = x.reshape(2, 5, heads, -1)
        return softmax(np.einsum("bqhd,bkhd->bhqk", x, x) / x.shape[-1] ** 0.5)

    return kl(r(t), r(s)).mean()


def np_hcl(s, t):
    loss, weight, total = ((s - t) ** 2).mean(), 1.0, 1.0
    for k, cuts in ((4, [(0, 3), (2, 5), (5, 8), (7, 10)]), (2, [(0, 5), (5, 10)]), (1, [(0, 10)])):
        weight /= 2
        pool = lambda x, cuts=cuts: np.stack(
            [np.stack([x[:, a:b, c:e].mean((1, 2)) for c, e in cuts], 1) for a, b in cuts], 1
        )
        assert pool(s).shape[1] == k
        loss += weight * ((pool(s) - pool(t)) ** 2).mean()
        total += weight
    return loss / total


def np_ranking(s, t):
    total = 0
    for a, b in zip(s, t, strict=True):
        order = np.argsort(-b)
        total += sum(np.log(np.exp(a[order[i:]]).sum()) - a[order[i]] for i in range(10))
    return total / 6


def np_js(s, t, alpha=0.3):
    p, q = softmax(t), softmax(s)
    m = alpha * p + (1 - alpha) * q
    return (alpha * kl(p, m) + (1 - alpha) * kl(q, m)).mean()


def np_alpha_beta(s, t, a=0.2, b=0.7):
    p, q = softmax(t), softmax(s)
    inner = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return (-inner.sum(1) / (a * b)).mean()


def np_top(s, t, k=3):
    total = 0
    for a, b in zip(softmax(s), softmax(t), strict=True):
        i = np.argsort(-b)[:k]
        p, q = np.append(b[i], 1 - b[i].sum()), np.append(a[i], 1 - a[i].sum())
        total += kl(p, q)
    return total / 6


def np_pearson(a, b, axis):
    a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
    return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


def np_dist_plus(a, s, b, t):
    return (
        np_dist(s, t)
        + 0.5 * (1 - np_pearson(a, b, -1).mean())
        + 2 * (1 - np_pearson(a.sum(-1), b.sum(-1), 0).mean())
    )


def np_skd_unsure(s, t):
    sure = softmax(t).max(1)
    return 9 * np.where(sure <= np.median(sure), kl(softmax(t / 3), softmax(s / 3)), 0).mean()


def np_skd_direction(s, t):
    gram = lambda x: unit(x, 1) @ unit(x, 1).T
    diff = gram(s) - gram(t)
    spread = np.cov(diff, rowvar=False) + 0.1 * np.eye(len(s))
    return np.sqrt(np.einsum("bi,ij,bj->b", diff, np.linalg.inv(spread), diff)).mean()


VAR, LOG_VAR = np.abs(f(8)) + 0.1, f(6, 10)
PAIRS = {
    "kd": (np_kd, lambda s, t: d.kd(s, t, temperature=3.0), S, T),
    "kd_with_labels": (
        np_labels, lambda s, t: d.kd_with_labels(s, t, LABELS, temperature=3.0, alpha=0.3), S, T,
    ),
    "dkd": (np_dkd, lambda s, t: d.dkd(s, t, LABELS, alpha=0.7, beta=5.0, temperature=2.0), S, T),
    "dist": (np_dist, lambda s, t: d.dist(s, t, temperature=2.0), S, T),
    "dist_plus": (
        np_dist_plus,
        lambda a, s, b, t: d.dist_plus((a, s), (b, t), temperature=2.0, channels=0.5, places=2.0),
        A, S, B, T,
    ),
    "skd_instance": (
        lambda s, t: kl(softmax(t / 4), softmax(s / 4)).mean(), d.skd_instance, S, T,
    ),
    "skd_instance, unsure": (
        np_skd_unsure, lambda s, t: d.skd_instance(s, t, temperature=3.0, unsure=True), S, T,
    ),
    "skd_direction": (np_skd_direction, d.skd_direction, S, T),
    "logit_std_kd": (np_logit_std, lambda s, t: d.logit_std_kd(s, t, temperature=2.0), S, T),
    "reverse": (lambda s, t: kl(softmax(s), softmax(t)).mean(), d.divergence, S, T),
    "jensen_shannon": (
        np_js, lambda s, t: d.divergence(s, t, method="jensen_shannon", alpha=0.3), S, T,
    ),
    "alpha_beta": (
        np_alpha_beta, lambda s, t: d.divergence(s, t, method="alpha_beta", alpha=0.2, beta=0.7), S, T,
    ),
    "skew": (
        lambda s, t: kl(softmax(t), 0.3 * softmax(t) + 0.7 * softmax(s)).mean(),
        lambda s, t: d.divergence(s, t, method="skew", alpha=0.3), S, T,
    ),
    "total_variation": (
        lambda s, t: 0.5 * np.abs(softmax(s) - softmax(t)).sum(1).mean(),
        lambda s, t: d.divergence(s, t, method="total_variation"), S, T,
    ),
    "top_k_kd": (np_top, lambda s, t: d.top_k_kd(s, t, k=3), S, T),
    "ranking": (np_ranking, d.ranking, S, T),
    "hint": (lambda s, t: ((s - t) ** 2).mean(), d.hint, A, B),
    "cosine": (lambda s, t: (1 - (unit(s, 1) * unit(t, 1)).sum(1)).mean(), d.cosine, S, T),
    "attention_transfer": (np_at, d.attention_transfer, A, B),
    "fsp": (np_fsp, lambda a, b, c, e: d.fsp((a, b), (c, e)), WIDE, A, WIDE_T, B),
    "nst": (np_nst, d.nst, A, B),
    "pkt": (np_pkt, d.pkt, S, T),
    "similarity_preserving": (np_sp, d.similarity_preserving, S, T),
    "ickd": (np_ickd, d.ickd, A, B),
    "affinity": (np_affinity, d.affinity, A, B),
    "rkd_distance": (np_rkd_d, d.rkd_distance, S, T),
    "rkd_angle": (np_rkd_a, d.rkd_angle, S, T),
    "cckd": (np_cckd, lambda s, t: d.cckd(s, t, gamma=0.4, order=2), unit(S, 1), unit(T, 1)),
    "activation_boundary": (np_ab, d.activation_boundary, A, B),
    "factor_transfer": (np_ft, d.factor_transfer, S, T),
    "kta": (np_ft, d.kta, S, T),
    "vid": (
        lambda m, v, t: (0.5 * ((m - t) ** 2 / v + np.log(v))).mean(), d.vid, A, VAR, B,
    ),
    "pad": (
        lambda s, t, v: ((t - s) ** 2 / (1e-6 + np.exp(v)) + v).mean(), d.pad, S, T, LOG_VAR,
    ),
    "srd": (
        np_srd, lambda a, x, b, y: d.srd((a, x), (b, y), exponent=4.0, temperature=2.0),
        S, f(6, 10), T, f(6, 10),
    ),
    "info_nce": (np_info, lambda s, t: d.info_nce(s, t, temperature=0.5), S, T),
    "cka": (np_cka, d.cka, S, T),
    "hierarchical_context": (np_hcl, d.hierarchical_context, WIDE, WIDE_T),
    "mgd": (lambda s, t: ((s - t) ** 2).sum() / 4, d.mgd, A, B),
    "attention_relation": (
        np_relation, lambda s, t: d.attention_relation(s, t, heads=3), HIDDEN, HIDDEN_T,
    ),
    "patient_kd": (
        lambda s, t: ((unit(s, 1) - unit(t, 1)) ** 2).sum(1).mean(),
        lambda s, t: d.patient_kd([s, s], [t, t]), S, T,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients(name):
    reference, loss, *arrays = PAIRS[name]
    found, grads = jax.jit(jax.value_and_grad(loss))(*(jnp.asarray(x) for x in arrays))
    wide = [x.astype(np.float64) for x in arrays]
    np.testing.assert_allclose(found, reference(*wide), rtol=2e-5, atol=1e-6)
    # the gradient along a random direction, against differences of the formula
    way = np.random.default_rng(2).normal(size=arrays[0].shape)
    step = 1e-6
    ahead, behind = (reference(wide[0] + e * step * way, *wide[1:]) for e in (1, -1))
    slope = (ahead - behind) / (2 * step)
    along = float(np.sum(np.asarray(grads, np.float64) * way))
    np.testing.assert_allclose(along, slope, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [n if n in ("kd", "hint", "pkt") else pytest.param(n, marks=pytest.mark.slow) for n in PAIRS],
)
def test_bfloat16_and_large_values(name):
    _, loss, *arrays = PAIRS[name]
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    found, grads = jax.jit(jax.value_and_grad(loss))(*half)
    exact = loss(*(x.astype(jnp.float32) for x in half))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2e-2, atol=1e-3)
    assert grads.dtype == jnp.bfloat16
    if name not in ("vid", "pad", "srd"):
        far = [jnp.asarray(x) * 100 for x in arrays]
        assert bool(jnp.isfinite(loss(*far)))


ODD = ("kd_with_labels", "dist_plus", "vid", "pad", "srd", "fsp", "ranking", "info_nce")
SAME = [name for name in PAIRS if name not in ODD]


@pytest.mark.parametrize("name", SAME)
def test_equal_networks_have_no_loss_and_finite_gradients(name):
    _, loss, x, *_ = PAIRS[name]
    x = jnp.asarray(x)
    found, grads = jax.jit(jax.value_and_grad(loss))(x, x)
    if name != "activation_boundary":
        assert abs(float(found)) < 1e-4
    assert bool(jnp.isfinite(grads).all())


EXAMPLES = {
    "kd": d.kd,
    "dkd": lambda s, t, **kw: d.dkd(s, t, LABELS, **kw),
    "kd_with_labels": lambda s, t, **kw: d.kd_with_labels(s, t, LABELS, **kw),
    "logit_std_kd": d.logit_std_kd,
    "divergence": d.divergence,
    "top_k_kd": lambda s, t, **kw: d.top_k_kd(s, t, k=4, **kw),
    "ranking": d.ranking,
    "pairs": lambda s, t, **kw: d.ranking(s, t, method="pair", margin=0.1, **kw),
    "cosine": d.cosine,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_per_example_where_and_vmap(name):
    loss = EXAMPLES[name]
    each = loss(S, T, reduction="none")
    assert each.shape == (6,)
    np.testing.assert_allclose(loss(S, T), each.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss(S, T, reduction="sum"), each.sum(), rtol=1e-5)
    keep = np.array([True, False, True, True, False, False])
    np.testing.assert_allclose(loss(S, T, where=keep), each[keep].mean(), rtol=1e-5)
    broken = jnp.asarray(S).at[1].set(jnp.inf)
    assert bool(jnp.isfinite(loss(broken, T, where=keep)))
    stacked = jax.vmap(lambda s, t: loss(s, t))(jnp.stack([S, T]), jnp.stack([T, S]))
    np.testing.assert_allclose(stacked, [loss(S, T), loss(T, S)], rtol=1e-5)


KINDS = [
    "forward",
    "reverse",
    "symmetric",
    "jensen_shannon",
    "skew",
    "total_variation",
    "alpha_beta",
]
DRAWS = np.random.default_rng(3).integers(0, 10, (6, 4))
KEEP = np.array([True, True, False, True, False, False])
TOKENS = np.array([[True, True, True, False, True], [True, False, True, True, False]])
ATTENTION, ATTENTION_T = softmax(np.random.default_rng(4).normal(size=(2, 2, 3, 5, 5)))
# every loss with `where`: how to call it, its inputs, the mask, and the mask over the inputs' entries
MASKED = {
    **{name: (loss, S, T, KEEP, KEEP[:, None]) for name, loss in EXAMPLES.items()},
    **{
        kind: (
            lambda s, t, kind=kind, **kw: d.divergence(s, t, method=kind, alpha=0.3, **kw),
            *(S, T, KEEP, KEEP[:, None]),
        )
        for kind in KINDS
    },
    "dist": (d.dist, S, T, KEEP, KEEP[:, None]),
    "sampled_kd": (lambda s, _, **kw: d.sampled_kd(s, DRAWS, **kw), S, T, KEEP, KEEP[:, None]),
    "sequence_kd": (lambda s, _, **kw: d.sequence_kd(s, LABELS, **kw), S, T, KEEP, KEEP[:, None]),
    "regularized_kd": (
        lambda s, _, **kw: d.regularized_kd(s, LABELS, **kw), S, T, KEEP, KEEP[:, None],
    ),
    "hint": (d.hint, S, T, KEEP[:, None], KEEP[:, None]),
    "vid": (
        lambda s, t, **kw: d.vid(s, jax.lax.stop_gradient(jnp.abs(t) + 1), t, **kw),
        S, T, KEEP[:, None], KEEP[:, None],
    ),
    "attention_relation": (
        lambda s, t, **kw: d.attention_relation(s, t, heads=3, **kw),
        HIDDEN, HIDDEN_T, TOKENS, TOKENS[..., None],
    ),
    "attention, kl": (
        d.attention_distribution, ATTENTION, ATTENTION_T, TOKENS,
        TOKENS[:, None, :, None] & TOKENS[:, None, None, :],
    ),
    "attention, mse": (
        lambda s, t, **kw: d.attention_distribution(s, t, method="mse", **kw),
        ATTENTION, ATTENTION_T, TOKENS, TOKENS[:, None, :, None] & TOKENS[:, None, None, :],
    ),
    "hidden_states": (
        lambda s, t, **kw: d.hidden_states([s], [t], **kw), HIDDEN, HIDDEN_T, TOKENS, TOKENS[..., None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
def test_what_is_masked_has_no_effect_whatever_it_holds(name):
    loss, s, t, where, entries = MASKED[name]
    run = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t, where=where), (0, 1)))
    value, grads = run(jnp.asarray(s), jnp.asarray(t))
    assert bool(jnp.isfinite(value))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        broken = [jnp.where(entries, x, bad) for x in (s, t)]
        other, others = run(*broken)
        np.testing.assert_array_equal(other, value)
        for a, b in zip(grads, others, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(jnp.where(entries, 0, b), 0)
    if entries.ndim == 2 and name not in ("hint", "vid"):
        with pytest.raises(ValueError, match="where: shape"):
            loss(s, t, where=where[:, None])


def test_every_loss_with_where_is_tested():
    takes = {n for n in d.__all__ if "where" in inspect.signature(getattr(d, n)).parameters}
    tested = {*MASKED, *(name.split(",")[0] for name in MASKED)}
    aliases = {"divergence", "ranking", "attention_distribution", "value_relation"}
    assert takes <= tested | aliases


@pytest.mark.parametrize("name", ["kd", "dkd", "logit_std_kd", "ranking", "dist", *KINDS])
def test_impossible_classes_are_as_if_absent(name):
    """Logits of -inf in student and teacher: vocabulary that this example cannot have."""
    loss = MASKED[name][0]
    if name == "dkd":
        loss = lambda s, t: d.dkd(s, t, LABELS % 7)
    barred = np.array([7, 9])
    s, t = (jnp.asarray(x).at[:, barred].set(-jnp.inf) for x in (S, T))
    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, grads = run(s, t)
    wanted, slopes = run(*(np.delete(x, barred, 1) for x in (S, T)))
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-7)
    for a, b in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(np.delete(a, barred, 1), b, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(a[:, barred], 0)


def test_each_example_its_temperature():
    temperature = np.linspace(1.0, 4.0, 6, dtype=np.float32)
    calls = {
        **{name: EXAMPLES[name] for name in EXAMPLES if name not in ("cosine",)},
        "sampled_kd": MASKED["sampled_kd"][0],
        "regularized_kd": MASKED["regularized_kd"][0],
    }
    for name, loss in calls.items():
        each = loss(S, T, temperature=temperature, reduction="none")
        alone = [
            loss(S, T, temperature=float(x), reduction="none")[i] for i, x in enumerate(temperature)
        ]
        np.testing.assert_allclose(each, jnp.stack(alone), rtol=1e-5, atol=1e-7, err_msg=name)
    sideways = d.kd(S.T, T.T, temperature=temperature, axis=0)
    np.testing.assert_allclose(sideways, d.kd(S, T, temperature=temperature), rtol=1e-6)
    padded = np.where(KEEP, temperature, 0)  # of examples that do not count
    loss = lambda s: d.kd(s, T, temperature=padded, where=KEEP)
    assert bool(jnp.isfinite(jax.grad(loss)(jnp.asarray(S))).all())


@pytest.mark.parametrize("name", ["kd_with_labels", "dkd", "sequence_kd", "regularized_kd"])
def test_ignored_labels(name):
    calls = {
        "kd_with_labels": lambda s, labels, **kw: d.kd_with_labels(s, T, labels, **kw),
        "dkd": lambda s, labels, **kw: d.dkd(s, T, labels, **kw),
        "sequence_kd": d.sequence_kd,
        "regularized_kd": d.regularized_kd,
    }
    loss, marked = calls[name], np.where(KEEP, LABELS, -100)
    value, grads = jax.value_and_grad(loss)(jnp.asarray(S), marked, ignore_label=-100)
    wanted, slopes = jax.value_and_grad(loss)(jnp.asarray(S), LABELS, where=KEEP)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(grads, slopes, rtol=1e-6)
    with pytest.raises(ValueError, match="-100 is none of 10 classes"):
        loss(S, marked)
    traced = jax.jit(lambda labels: loss(S, labels))
    assert bool(jnp.isnan(traced(np.where(KEEP, LABELS, -1))))
    assert bool(jnp.isfinite(traced(LABELS)))


def test_axis():
    np.testing.assert_allclose(d.kd(S.T, T.T, axis=0), d.kd(S, T), rtol=1e-6)
    np.testing.assert_allclose(d.dkd(S.T, T.T, LABELS, axis=0), d.dkd(S, T, LABELS), rtol=1e-6)


def test_sampled_classes_estimate_the_full_cross_entropy():
    draws = jax.random.categorical(jax.random.key(0), T, shape=(20_000, 6)).T
    full = -(softmax(T) * np.log(softmax(S))).sum(1).mean()
    np.testing.assert_allclose(d.sampled_kd(S, draws), full, rtol=2e-2)


def test_regularized_is_label_smoothing_at_temperature_one():
    smooth = np.full((6, 10), 0.1 / 9)
    smooth[np.arange(6), LABELS] = 0.9
    wanted = (smooth * (np.log(smooth) - np.log(softmax(S)))).sum(1).mean()
    found = d.regularized_kd(S, LABELS, correct=0.9, temperature=1.0, alpha=0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_crd_equals_its_formula_and_moves_its_memory():
    s, t = unit(f(3, 4), 1), unit(f(3, 4), 1)
    state = d.crd_init(jax.random.key(0), 20, 4)
    index, negatives = np.array([2, 5, 7]), RNG.integers(0, 20, (3, 6))
    loss, new = d.crd(s, t, state, index, negatives)
    seen = np.concatenate([index[:, None], negatives], 1)
    total, noise = 0.0, 6 / 20
    for memory, x in ((state.teacher, s), (state.student, t)):
        e = np.exp(np.einsum("bkf,bf->bk", np.asarray(memory)[seen], x) / 0.07)
        e = e / (e.mean() * 20)
        hit = np.log(e[:, 0] / (e[:, 0] + noise))
        miss = np.log(noise / (e[:, 1:] + noise))
        total -= (hit.sum() + miss.sum()) / 3
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    moved = unit(0.5 * np.asarray(state.student[2]) + 0.5 * s[0], 0)
    np.testing.assert_allclose(new.student[2], moved, rtol=1e-5)
    np.testing.assert_array_equal(new.student[3], state.student[3])
    again, later = d.crd(s, t, new, index, negatives)
    assert later.student_constant == new.student_constant
    assert again < loss


def test_sskd_parts():
    x, e = f(8, 10), f(8, 6)
    labels = np.array([3, 7])
    zero = d.sskd((x, e), (x, e), labels, weights=(0.0, 1.0, 1.0, 1.0))
    assert abs(float(zero)) < 1e-5
    only = d.sskd((x, e), (f(8, 10), e), labels, weights=(1.0, 0.0, 0.0, 0.0))
    wanted = -np.log(softmax(x[::4])[np.arange(2), labels]).mean()
    np.testing.assert_allclose(only, wanted, rtol=1e-5)
    same = np.repeat(np.eye(4, dtype=np.float32), 4, 0)
    assert d.self_supervision(same) < d.self_supervision(f(16, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d.kd(S, T[:, :9]), "9 classes"),
        (lambda: d.kd(S, T, temperature=0.0), "above 0"),
        (lambda: d.kd(S, T, temperature=-1.0), "above 0"),
        (lambda: d.kd(S, T, temperature=np.zeros(6)), "above 0"),
        (lambda: d.kd(S, T, temperature=np.ones(5)), "one per example"),
        (lambda: d.dist(S, T, temperature=np.ones(6)), "compares"),
        (lambda: d.kd(S, T, reduction="avg"), "expected one of"),
        (lambda: d.dkd(S, T, LABELS[:5]), "labels: expected integers"),
        (lambda: d.dkd(S, T, LABELS.astype(float)), "labels: expected integers"),
        (lambda: d.kd_with_labels(S, T, LABELS, alpha=1.5), r"\[0, 1\]"),
        (lambda: d.hint(A, WIDE), "projector"),
        (lambda: d.attention_transfer(A, WIDE), "resized"),
        (lambda: d.rkd_angle(S, T[:5]), "batch of 5"),
        (lambda: d.top_k_kd(S, T, k=11), "more than the 10"),
        (lambda: d.info_nce(S, T, temperature=0), "above 0"),
        (lambda: d.cckd(S, T, kernel="rbf"), "expected one of"),
        (lambda: d.attention_relation(HIDDEN, HIDDEN_T, heads=5), "do not divide"),
        (lambda: d.patient_kd([S], [T, T]), "2 layers"),
        (lambda: d.layer_map(5, 3), "more than the teacher"),
        (lambda: d.divergence(S, T, method="alpha_beta", alpha=0.0), "may be 0"),
        (lambda: d.sskd((S, S), (T, T), LABELS), "multiple of 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_projectors_train():
    x, t = f(32, 6), f(32, 9)
    for make in (d.dense_projector(6, 9), d.dense_projector(6, 9, hidden=16)):
        params = make.init(jax.random.key(0))
        loss = lambda p, make=make: d.hint(make.apply(p, x), t)
        before = loss(params)
        descend = lambda _, p, loss=loss: jax.tree.map(
            lambda p, g: p - 0.1 * g, p, jax.grad(loss)(p)
        )
        params = jax.jit(lambda p, f=descend: jax.lax.fori_loop(0, 200, f, p))(params)
        assert loss(params) < 0.95 * before
    fuse = d.review_fusion(8, 6, 10)
    deep, shallow = d.review_fusion(6, 6, 10, fuse=False), fuse.init(jax.random.key(1))
    _, fused = deep.apply(deep.init(jax.random.key(0)), A[..., :6], None, (5, 5))
    features, _ = fuse.apply(shallow, WIDE[..., [0, 1, 2, 3, 4, 5, 0, 1]], fused, (7, 7))
    assert features.shape == (4, 7, 7, 10)
