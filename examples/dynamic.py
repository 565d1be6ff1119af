"""Gates on a CNN decide for each image of Fashion-MNIST which channels run, beside static pruning.

    pip install "jaxprune[cli,plots]"
    sudo apt install dataset-fashion-mnist   # or the four .gz files of any other source, with --data
    python examples/dynamic.py

The five steps of dynamic pruning: train the network; design gates (`jp.linen.GatedConv`); train both
together, taught by the dense network, towards a budget of multiply-adds, with top-k gates, gates pushed
by L1, hard-concrete gates with an expected L0, or a policy trained by REINFORCE; run with pruning;
fine-tune (here the last epochs of joint training, with gates that no longer move). Channels removed for
good, to the same budget and after the same fine-tuning, stand beside. Prints accuracy, mean
multiply-adds and latency; draws accuracy against multiply-adds, and what the gates do.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fashion_resnet import load
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune as jp
from jaxprune.reports import human_seconds, plot_gates, seconds

BATCH, CLASSES, GATE_RATE = 128, 10, 1e-2
LAYERS = ("conv1", "conv2", "conv3", "conv4")
READS = dict(itertools.pairwise(LAYERS[::-1]))  # whose channels a layer reads
METHODS = {
    "top-k": "top_k",
    "L1": "straight_through",
    "hard-concrete": "hard_concrete",
    "REINFORCE": "bernoulli",
}
WEIGHTS = {"top_k": 0.0, "straight_through": 1.5, "hard_concrete": 10.0, "bernoulli": 5.0}
NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)


class CNN(nn.Module):
    """Five convolutions; gates on the last four.

    Attributes:
      method: of `jp.linen.GatedConv`, or None for a plain network.
      k: of top-k gates.
      widths: channels of all five.
    """

    method: str | None = None
    k: float = 0.5
    widths: tuple[int, ...] = (16, 32, 32, 64, 64)

    def setup(self):
        conv = lambda n, stride: nn.Conv(n, (3, 3), (stride, stride))
        gated = lambda n, stride: jp.linen.GatedConv(
            n, (3, 3), (stride, stride), method=self.method, k=self.k, reduction=4
        )
        make = conv if self.method is None else gated
        self.stem = conv(self.widths[0], 2)
        self.conv1, self.conv2 = make(self.widths[1], 1), make(self.widths[2], 1)
        self.conv3, self.conv4 = make(self.widths[3], 2), make(self.widths[4], 1)
        self.head = nn.Dense(CLASSES)

    def __call__(self, x, deterministic=True):
        more = {} if self.method is None else {"deterministic": deterministic}
        x = nn.relu(self.stem(x))
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = nn.relu(layer(x, **more))
        return self.head(x.reshape(len(x), -1))

    def skip(self, x):
        """One image, top-k gates: closed channels are not computed."""
        x, index = nn.relu(self.stem(x)), None
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x, index = layer.skip(x, index)
            x = nn.relu(x)
        return self.head(jp.gates.scattered(x, index, self.widths[-1]).reshape(1, -1))

    def bucketed(self, x):
        """One image, gates that open any number: a bucket that holds the open channels is computed."""
        x, opened = nn.relu(self.stem(x)), None
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x, opened = layer.bucketed(x, opened)
            x = nn.relu(x)
        return self.head(x.reshape(1, -1))


def gated_params(module, dense, key):
    """The trained network's parameters, with those of its new gates."""
    fresh = module.init(key, jnp.zeros((1, 28, 28, 1)))["params"]
    conv = {name: {"conv": dense[name], "gate": fresh[name]["gate"]} for name in LAYERS}
    return {**dense, **conv}


def forward(module, params, x, key=None):
    """Logits, gates by layer, and the logits of gates by layer."""
    rngs = None if key is None else {"gates": key}
    out, seen = module.apply(
        {"params": params}, x, key is None, rngs=rngs, mutable=["gates", "gate_logits"]
    )
    by_layer = lambda tree: {name: tree[name]["gate"]["gate"][0] for name in LAYERS if name in tree}
    return out, by_layer(seen.get("gates", {})), by_layer(seen.get("gate_logits", {}))


def macs_of():
    """Multiply-adds of each layer for one image, and those of the gates."""
    module = CNN("straight_through")
    image = jnp.zeros((1, 28, 28, 1))
    plain = CNN()
    whole = jp.trace(plain.apply, plain.init(jax.random.key(0), image), image).cost()
    each = [op.flops / 2 for op in whole.operations if op.name == "conv_general_dilated"]
    named = dict(zip(("stem", *LAYERS), each, strict=True))
    named["head"] = whole.macs - sum(each)
    gated = jp.trace(module.apply, module.init(jax.random.key(0), image), image).cost()
    return named, gated.macs - whole.macs


def loss_of(module, costs, overhead, budget, weight):
    """Joint training: the task, taught by the dense network, and what is above the budget.

    A policy gets its task and its cost as its reward.
    """
    total = sum(costs.values())
    hard = optax.softmax_cross_entropy_with_integer_labels

    def spent(gates):
        return jp.gates.example_costs(gates, costs, inputs=READS) + overhead / total

    def loss(params, x, y, soft, step, key):
        out, gates, logits = forward(module, params, x, None if module.method is None else key)
        taught = 0.0 if soft is None else 2 * jp.distill.dist(out, soft)
        task = hard(out, y) + taught
        if module.method is None:
            return task.mean()
        if module.method == "top_k":  # the budget is k
            return task.mean() + 1e-4 * jp.gates.l1_penalty(jnp.concatenate([*gates.values()], -1))
        if module.method == "bernoulli":
            # what an example earns with its most likely gates is the baseline (self-critical)
            best, likely, _ = forward(module, params, x)
            price = weight(step) * (jnp.mean(spent(likely)) > budget)
            reward = lambda task, gates: -task - price * spent(gates)
            advantage = reward(hard(out, y), gates) - reward(hard(best, y), likely)
            policy = jp.gates.reinforce(
                jnp.concatenate([*logits.values()], -1),
                jnp.concatenate([*gates.values()], -1),
                advantage,
                entropy_bonus=1e-4,
            )
            return task.mean() + policy
        off = jnp.mean(spent(gates)) - budget
        if module.method == "hard_concrete":  # what runs decides whether the expected L0 is pushed
            runs = {name: jp.gates.hard_concrete_mean(value) != 0 for name, value in logits.items()}
            expected = {name: jp.gates.expected_l0(value) for name, value in logits.items()}
            off = jnp.sign(jnp.mean(spent(runs)) - budget) * jnp.mean(spent(expected))
            return task.mean() + weight(step) * off
        return task.mean() + weight(step) * jnp.abs(off)

    return loss


def parts(params):
    """Which parameters belong to gates."""
    of = lambda path: "gates" if any(getattr(k, "key", "") == "gate" for k in path) else "weights"
    return jax.tree_util.tree_map_with_path(lambda path, _: of(path), params)


def fit(module, params, data, epochs, rate, seed, name, loss):
    """A stock loop: Adam under a cosine schedule; `data` with a teacher's logits if there is one."""
    images, labels, *teacher = data
    steps = epochs * (len(labels) // BATCH)
    adam = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, steps))
    tx = optax.multi_transform({"weights": adam(rate), "gates": adam(GATE_RATE)}, parts)

    @jax.jit
    def step(params, state, number, x, y, soft):
        key = jax.random.fold_in(jax.random.key(seed), number)
        updates, state = tx.update(jax.grad(loss)(params, x, y, soft, number, key), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(seed)
    order = np.concatenate(
        [rng.permutation(len(labels))[: len(labels) // BATCH * BATCH] for _ in range(epochs)]
    )
    for number, index in enumerate(track(order.reshape(steps, BATCH), description=f"{name:<24}")):
        soft = teacher[0][index] if teacher else None
        params, state = step(params, state, number, images[index], labels[index], soft)
    return params


def look(module, params, data, costs, overhead):
    """Accuracy, mean share of the multiply-adds, and what the gates did."""
    images, labels = data
    batches = [(images[i : i + 500], labels[i : i + 500]) for i in range(0, len(images), 500)]

    def run(x, y):
        out, gates, _ = forward(module, params, x)
        return {
            "right": jnp.argmax(out, -1) == y,
            "loss": optax.softmax_cross_entropy_with_integer_labels(out, y),
            "gates": gates,
        }

    found = jp.gates.over_batches(run, batches)
    right = float(found["right"].mean())
    if not found["gates"]:
        return right, 1.0, None
    seen = jp.gates.inspect(
        found["gates"], labels=labels, costs=costs, inputs=READS, difficulty=found["loss"]
    )
    return right, float(seen.costs.mean()) + overhead / sum(costs.values()), seen


def logits_of(module, params, images):
    """Logits of all images."""
    run = jax.jit(lambda x: module.apply({"params": params}, x))
    return np.concatenate([run(images[i : i + 500]) for i in range(0, len(images), 500)])


def static(dense, data, budget, epochs, seed, name):
    """Channels removed for good by Taylor scores, and the small network fine-tuned."""
    module, image = CNN(), jnp.zeros((1, 28, 28, 1))
    hard = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(
        module.apply({"params": p}, x), y
    ).mean()
    slopes = jax.jit(jax.grad(hard))(dense, data[0][:2000], data[1][:2000])
    apply = lambda params, x: module.apply({"params": params}, x)
    graph = jp.trace(apply, dense, image)
    masks = jp.structure.unit_masks(graph, jp.scores.taylor(dense, slopes), flops=budget)
    _, small = jp.compact(apply, dense, masks, image)
    widths = jp.structure.widths(graph, masks)
    narrow = CNN(widths=tuple(widths[f"{n}/kernel"][-1] for n in ("stem", *LAYERS)))
    loss = loss_of(narrow, {"stem": 1.0}, 0.0, 1.0, lambda step: 0.0)
    small = fit(narrow, small, data, epochs, 1e-3, seed, name, loss)
    whole, left = graph.cost().macs, graph.cost(masks).macs
    return narrow, small, left / whole


def k_for(budget, costs, overhead):
    """The share of channels that top-k gates may open."""
    total = sum(costs.values())
    shares = np.linspace(0.02, 1, 99)
    spent = [
        float(
            jp.gates.example_costs({n: jnp.full((1, 1), s) for n in LAYERS}, costs, inputs=READS)[0]
        )
        + overhead / total
        for s in shares
    ]
    return float(shares[np.searchsorted(spent, budget) - 1])


def compare(arguments, train, test, seeds):
    """All methods at all budgets: `{method: {factor: [(accuracy, share of macs)]}}`, and last
    networks.
    """
    costs, overhead = macs_of()
    steps = arguments.epochs * (len(train[1]) // BATCH)
    warm = jp.schedules.linear(1.0, end=max(steps // 2, 1))
    found: dict[str, Any] = {"dense": {1.0: []}}
    last: dict[str, Any] = {}
    for seed in seeds:
        plain = CNN()
        params = plain.init(jax.random.key(seed), train[0][:1])["params"]
        loss = loss_of(plain, costs, 0.0, 1.0, warm)
        dense = fit(plain, params, train, arguments.dense_epochs, 2e-3, seed, "dense", loss)
        tuned = fit(plain, dense, train, arguments.epochs, 1e-3, seed, "dense, trained on", loss)
        right = look(plain, tuned, test, costs, 0.0)[0]
        found["dense"][1.0].append((right, 1.0))
        last["dense"] = plain, tuned
        taught = (*train, logits_of(plain, tuned, train[0]))
        print(f"seed {seed} dense: {right:.4f}", flush=True)
        for factor in arguments.factors if seed == 0 else [arguments.factors[0]]:
            name = f"{factor:g}x, static"
            module, params, share = static(dense, taught, 1 / factor, arguments.epochs, seed, name)
            right = look(module, params, test, costs, 0.0)[0]
            found.setdefault("static", {}).setdefault(factor, []).append((right, share))
            last["static", factor] = module, params, None
            for label, method in METHODS.items():
                module = CNN(method, k_for(1 / factor, costs, overhead))
                params = gated_params(module, dense, jax.random.key(100 + seed))
                weight = lambda step, most=WEIGHTS[method]: most * warm(step)
                loss = loss_of(module, costs, overhead, 0.97 / factor, weight)
                params = fit(
                    module,
                    params,
                    taught,
                    arguments.epochs,
                    1e-3,
                    seed,
                    f"{factor:g}x, {label}",
                    loss,
                )
                right, share, seen = look(module, params, test, costs, overhead)
                found.setdefault(label, {}).setdefault(factor, []).append((right, share))
                last[label, factor] = module, params, seen
                print(f"seed {seed} {factor:g}x {label}: {right:.4f} {share:.4f}", flush=True)
            print(f"seed {seed} {factor:g}x static: {found['static'][factor][-1]}", flush=True)
    return found, last


def plot(path, found):
    """Accuracy against mean multiply-adds."""
    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, by_factor) in enumerate(found.items()):
        points = sorted(tuple(np.mean(runs, 0)) for runs in by_factor.values())
        right, share = zip(*points, strict=True)
        if name == "dense":
            axes.axhline(100 * right[0], color="0.4", ls="--", lw=1, label="dense")
            continue
        style = "s--" if name == "static" else "o-"
        axes.plot(100 * np.array(share), 100 * np.array(right), style, color=f"C{i}", label=name)
        for runs in by_factor.values():
            if len(runs) > 1:
                spread = 100 * np.array(runs)
                axes.scatter(spread[:, 1], spread[:, 0], s=9, color=f"C{i}", alpha=0.6)
    axes.set_xlabel("mean multiply-adds per image, % of dense (gates included)")
    axes.set_ylabel("test accuracy in %")
    axes.set_title("Fashion-MNIST: channels chosen per image, and for good")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)


def show(found, last, test, main_factor):
    """Accuracy, multiply-adds and measured latency."""
    one, many = test[0][:1], test[0][:BATCH]
    table = Table(title="CNN on Fashion-MNIST; mean over seeds, worst and best in brackets")
    for column in ("network", "accuracy", "macs", "fewer", "batch 1", f"batch {BATCH}"):
        table.add_column(column, justify="left" if column == "network" else "right")
    time = {}
    for name, by_factor in found.items():
        for factor, runs in by_factor.items():
            right, share = np.mean(runs, 0)
            module, params = last["dense"] if name == "dense" else last[name, factor][:2]
            run = lambda p, x, m=module: m.apply({"params": p}, x)
            how = {None: "__call__", "top_k": "skip"}.get(module.method, "bucketed")
            one_by_one = lambda p, x, m=module, how=how: m.apply({"params": p}, x, method=how)
            first = seconds(one_by_one, params, one)
            time[name] = first, seconds(run, params, many)
            spread = (
                ""
                if len(runs) == 1
                else f" ({min(r for r, _ in runs):.2%}, {max(r for r, _ in runs):.2%})"
            )
            label = name if name == "dense" else f"{name}, {factor:g}x"
            table.add_row(
                label, f"{right:.2%}{spread}", f"{share:.1%}", f"{1 / share:.2f}x",
                *map(human_seconds, time[name]),
            )  # fmt: skip
    console = Console()
    console.print(table)
    for name in METHODS:
        console.print(f"\n{name}, {main_factor:g}x fewer multiply-adds")
        console.print(last[name, main_factor][2].table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument("--data", type=Path, default=default, help="folder of the four .gz files")
    parser.add_argument("--dense-epochs", type=int, default=6, help="of training the dense network")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of joint training and of fine-tuning"
    )
    parser.add_argument("--images", type=int, default=60000, help="use only so many for training")
    parser.add_argument("--seeds", type=int, default=3, help="of the first factor; others have one")
    parser.add_argument("--factors", type=float, nargs="+", default=[3.0, 2.0, 5.0])
    parser.add_argument("--pictures", type=Path, default=Path("."), help="folder")
    arguments = parser.parse_args()
    train, test = load(arguments.data)
    train = tuple(array[: arguments.images] for array in train)
    found, last = compare(arguments, train, test, range(arguments.seeds))
    show(found, last, test, arguments.factors[0])
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    plot(arguments.pictures / "dynamic.png", found)
    seen = last["L1", arguments.factors[0]][2]
    plot_gates(
        arguments.pictures / "gates.png", seen, images=test[0], classes=NAMES,
        title=f"L1 gates at {arguments.factors[0]:g}x fewer multiply-adds",
    )  # fmt: skip


if __name__ == "__main__":
    main()
