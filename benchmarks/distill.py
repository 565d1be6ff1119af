"""Distillation: what a step costs, what each method brings on one pair, and the benefit on Fashion-MNIST.

    python benchmarks/distill.py                      # costs, and all methods on the demo's images
    python benchmarks/distill.py --fashion FOLDER     # 3 seeds, a ResNet and a student 8 times smaller

The images of the demo: `pip install "jaxprune[demo]"`; Fashion-MNIST: see examples/fashion_resnet.py.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _timing import in_turns
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxprune import distill as d
from jaxprune.cli import _cnn, _mnist

AT = {"a": "Conv_0/bias", "b": "Conv_1/bias", "h": "Dense_0/bias"}
SMALL = (8, 16, 24)
BATCH = 128


def hard(out, batch):
    return optax.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()


def methods():
    """Terms by name: a weight, a loss, and a projector if there is one."""
    fit_h = d.dense_projector(SMALL[2], 128)
    fit_b = d.conv_projector(SMALL[1], 64)
    vid = d.vid_regressor(SMALL[1], 64)
    mgd = d.mgd_generator(SMALL[1], 64)
    of_h = lambda f: lambda s, t, b, p: f(fit_h.apply(p, s.at["h"]), t.at["h"])
    of_b = lambda f: lambda s, t, b, p: f(fit_b.apply(p, s.at["b"]), t.at["b"])
    plain = lambda f: lambda s, t, b, p: f(s, t, b)
    key = jax.random.key(9)
    small = lambda x: d.resized(x, (7, 7))
    return {
        "kd": (1.0, plain(lambda s, t, b: d.kd(s.out, t.out)), None),
        "dkd": (1.0, plain(lambda s, t, b: d.dkd(s.out, t.out, b[1], beta=2.0)), None),
        "dist": (2.0, plain(lambda s, t, b: d.dist(s.out, t.out)), None),
        "skd_instance": (16.0, plain(lambda s, t, b: d.skd_instance(s.out, t.out)), None),
        "skd_direction": (0.5, plain(lambda s, t, b: d.skd_direction(s.out, t.out)), None),
        "dist_plus": (
            1.0,
            lambda s, t, b, p: d.dist_plus(
                (fit_b.apply(p, s.at["b"]), s.out), (t.at["b"], t.out)
            ),
            fit_b,
        ),
        "logit_std_kd": (2.0, plain(lambda s, t, b: d.logit_std_kd(s.out, t.out)), None),
        "divergence (reverse)": (
            4.0, plain(lambda s, t, b: d.divergence(s.out, t.out, temperature=2.0)), None,
        ),
        "divergence (js)": (
            4.0,
            plain(lambda s, t, b: d.divergence(s.out, t.out, method="jensen_shannon", temperature=4.0)),
            None,
        ),
        "top_k_kd": (1.0, plain(lambda s, t, b: d.top_k_kd(s.out, t.out, k=3, temperature=4.0)), None),
        "ranking": (0.1, plain(lambda s, t, b: d.ranking(s.out, t.out)), None),
        "regularized_kd": (1.0, plain(lambda s, t, b: d.regularized_kd(s.out, b[1])), None),
        "hint": (1.0, of_b(d.hint), fit_b),
        "cosine": (1.0, of_h(d.cosine), fit_h),
        "whitened_mse": (0.3, of_h(d.whitened_mse), fit_h),
        "attention_transfer": (
            500.0, plain(lambda s, t, b: d.attention_transfer(s.at["b"], t.at["b"])), None,
        ),
        "nst": (20.0, plain(lambda s, t, b: d.nst(s.at["b"], t.at["b"])), None),
        "fsp": (
            0.01,
            lambda s, t, b, p: d.fsp(
                (s.at["b"], fit_b.apply(p, s.at["b"])), (t.at["b"][..., : SMALL[1]], t.at["b"])
            ),
            fit_b,
        ),
        "vid": (0.3, lambda s, t, b, p: d.vid(*vid.apply(p, s.at["b"]), t.at["b"]), vid),
        "mgd": (1e-4, lambda s, t, b, p: d.mgd(mgd.apply(p, s.at["b"], key), t.at["b"]), mgd),
        "factor_transfer": (50.0, of_h(d.factor_transfer), fit_h),
        "activation_boundary": (
            0.005, lambda s, t, b, p: d.activation_boundary(fit_h.apply(p, s.at["h"]), t.at["h"]), fit_h,
        ),
        "srd": (
            0.1,
            lambda s, t, b, p: d.srd(
                (d.batch_normalized(fit_h.apply(p, s.at["h"])), s.out),
                (d.batch_normalized(t.at["h"]), t.out),
                exponent=4.0,
            ),
            fit_h,
        ),
        "hierarchical_context": (
            1.0,
            lambda s, t, b, p: d.hierarchical_context(
                small(fit_b.apply(p, s.at["b"])), small(t.at["b"])
            ),
            fit_b,
        ),
        "rkd_distance": (5.0, plain(lambda s, t, b: d.rkd_distance(s.at["h"], t.at["h"])), None),
        "rkd_angle": (10.0, plain(lambda s, t, b: d.rkd_angle(s.at["h"][:64], t.at["h"][:64])), None),
        "cckd": (
            50.0,
            plain(lambda s, t, b: d.cckd(jax.nn.softmax(s.out), jax.nn.softmax(t.out))),
            None,
        ),
        "similarity_preserving": (
            1000.0, plain(lambda s, t, b: d.similarity_preserving(s.at["h"], t.at["h"])), None,
        ),
        "pkt": (2000.0, plain(lambda s, t, b: d.pkt(s.at["h"], t.at["h"])), None),
        "ickd": (5.0, of_b(d.ickd), fit_b),
        "affinity": (0.5, of_b(d.affinity), fit_b),
        "cka": (1.0, plain(lambda s, t, b: d.cka(s.at["h"], t.at["h"])), None),
        "info_nce": (0.3, of_h(d.info_nce), fit_h),
    }  # fmt: skip


def start(seed):
    """A student 13 times smaller than the demo's network."""
    return _cnn.CNN(SMALL).init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))["params"]


def train(loss_fn, params, extra, teacher, data, epochs, seed):
    """A stock loop over student and projector; accuracy on the test images."""
    steps = epochs * (len(data.train_labels) // _cnn.BATCH)
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def step(both, state, batch):
        loss = lambda both: loss_fn(both[0], teacher, batch, None, both[1])
        grads = jax.grad(loss, has_aux=True)(both)[0]
        updates, state = tx.update(grads, state, both)
        return optax.apply_updates(both, updates), state

    both = (params, extra)
    state = tx.init(both)
    for x, y in _cnn.batches(data.train_images, data.train_labels, epochs, seed):
        both, state = step(both, state, (x, y))
    return float(_cnn.accuracy(both[0], data.test_images, data.test_labels))


def compare(seeds, epochs):
    """Every method on one pair."""
    data = _mnist.load(0)
    few = np.random.default_rng(0).permutation(len(data.train_labels))[:1000]
    scarce = data._replace(train_images=data.train_images[few], train_labels=data.train_labels[few])
    whole = _cnn.train(
        _cnn.new_state(_cnn.new_params(0), optax.adam(1e-3)),
        _cnn.batches(data.train_images, data.train_labels, 8, 0),
        lambda: None,
    ).params
    batch = (data.train_images[:125], data.train_labels[:125])
    ready, calls = {}, {}
    terms = {"alone": (0.0, None, None), **methods()}
    for name, (weight, term, projector) in terms.items():
        wired = {} if term is None else {name: (weight, term)}
        at = None if term is None else AT
        loss_fn = d.objective(
            _cnn.apply, _cnn.apply, wired, task=hard, student_at=at, teacher_at=at
        )
        extra = {} if projector is None else projector.init(jax.random.key(1))
        ready[name] = loss_fn, extra
        params = start(0)
        run = jax.jit(
            jax.grad(lambda both, b, f=loss_fn: f(both[0], whole, b, None, both[1]), has_aux=True)
        )
        calls[name] = lambda run=run, params=params, extra=extra: run((params, extra), batch)
    seconds = in_turns(calls, rounds=7)
    table = Table(title=f"Student 13x smaller, 1,000 images, {epochs} epochs, {seeds} seeds")
    for column in ("method", "accuracy", "gain", "step, relative to alone"):
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_row(
        "teacher", f"{float(_cnn.accuracy(whole, data.test_images, data.test_labels)):.2%}"
    )
    base = None
    for name, (loss_fn, extra) in track(ready.items(), description="methods"):
        found = [train(loss_fn, start(s), extra, whole, scarce, epochs, s) for s in range(seeds)]
        mean = float(np.mean(found))
        base = mean if base is None else base
        gain = f"{100 * (mean - base):+.2f}"
        table.add_row(name, f"{mean:.2%}", gain, f"{seconds[name] / seconds['alone']:.2f}")
    Console().print(table)


def cost():
    """A step with distillation beside the teacher's forward pass and the student's step."""
    data = _mnist.load(0)
    batch = (data.train_images[:125], data.train_labels[:125])
    whole, small = _cnn.new_params(0), start(0)
    soft = lambda s, t, b: d.kd(s.out, t.out)
    both = d.objective(_cnn.apply, _cnn.apply, {"kd": (1.0, soft)}, task=hard)
    alone = d.objective(_cnn.apply, None, {}, task=hard)
    forward = jax.jit(_cnn.apply)
    one, two = (jax.jit(jax.grad(f, has_aux=True)) for f in (alone, both))
    seconds = in_turns(
        {
            "teacher forward": lambda: forward(whole, batch[0]),
            "student step": lambda: one(small, whole, batch),
            "kd step": lambda: two(small, whole, batch),
        },
        rounds=25,
    )
    apart = seconds["teacher forward"] + seconds["student step"]
    print(f"kd step: {seconds['kd step'] / apart:.2f} of teacher forward + student step")


def fashion(folder, epochs, seeds):
    """A ResNet, and a student 8 times smaller alone and distilled."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    import fashion_resnet as example

    train_data, test_data = example.load(Path(folder))
    image = jnp.zeros((1, 28, 28, 1))
    teacher = example.ResNet()
    whole = example.fit(
        teacher, teacher.init(jax.random.key(0), image), train_data, epochs, 3e-3, "teacher"
    )
    logits = example.predict(teacher, whole, train_data[0])
    student = example.ResNet(stages=(6, 11, 22), inner=(6, 6, 11, 11, 22, 22))
    table = Table(title=f"Fashion-MNIST, {epochs} epochs")
    for column in ("network", "parameters", "accuracy"):
        table.add_column(column)
    count = lambda v: f"{sum(x.size for x in jax.tree.leaves(v['params'])):,}"
    table.add_row("teacher", count(whole), f"{example.accuracy(teacher, whole, test_data):.2%}")
    hard = lambda s, y: optax.softmax_cross_entropy_with_integer_labels(s, y).mean()
    kinds = {
        "student alone": lambda s, t, y: hard(s, y),
        "student, kd": lambda s, t, y: 0.1 * hard(s, y) + 0.9 * d.kd(s, t, temperature=4.0),
        "student, dist": lambda s, t, y: hard(s, y) + 2 * d.dist(s, t, temperature=1.0),
    }
    for name, loss in kinds.items():
        found = []
        for seed in range(seeds):
            start = student.init(jax.random.key(seed + 1), image)
            data = (*train_data, logits)
            tuned = with_teacher(student, start, data, epochs, seed, loss, f"{name}, seed {seed}")
            found.append(example.accuracy(student, tuned, test_data))
        each = ", ".join(f"{value:.2%}" for value in found)
        table.add_row(name, count(start), f"{np.mean(found):.2%} ({each})")
    Console().print(table)


def with_teacher(module, variables, data, epochs, seed, loss, name):
    """Trains with Adam on `loss(logits, the teacher's logits, labels)`."""
    images, labels, logits = data
    steps = epochs * (len(labels) // BATCH)
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(variables, state, x, y, t):
        def full(params):
            s, updated = module.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return loss(s, t, y), updated

        grads, updated = jax.grad(full, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, state

    state, rng = tx.init(variables["params"]), np.random.default_rng(seed)
    order = [rng.permutation(len(labels))[: len(labels) // BATCH * BATCH] for _ in range(epochs)]
    for index in track(np.concatenate(order).reshape(steps, BATCH), description=name):
        variables, state = step(variables, state, images[index], labels[index], logits[index])
    return variables


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.fashion:
        fashion(arguments.fashion, arguments.epochs or 3, arguments.seeds)
        return
    cost()
    compare(arguments.seeds, arguments.epochs or 15)


if __name__ == "__main__":
    main()
