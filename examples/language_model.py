"""A language model end to end: prune heads, neurons and layers, recover, quantize, generate, serve.

    pip install "jaxprune[cli,export,plots]"
    python examples/language_model.py [--text book.txt] [--scanned] [--quick] [--plot language_model.png]

Trains a decoder on characters of the Python reference (`help()` texts, which every Python carries), or of
a text file. Cuts it to parts of its parameters by width, by depth and by both, recovers each by
distillation, and compares bits per character on text held out with the dense one trained on for as many
steps, and with one of the same size trained from scratch. The one of half the parameters is quantized
to 8 and 4 bits, generates with a small KV cache, goes to a folder, and is served from it by a process
that has neither this file nor flax.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import _decoder
import _generation as generation
import _text
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxprune as jp
from jaxprune.reports import human_bytes

LOG2 = float(np.log(2))


@dataclass(frozen=True)
class Plan:
    """How long, how large: the whole page, or a short one.

    Attributes:
      steps: of training; of recovery, and of the dense one trained on.
      parts: fractions of the parameters to keep, by what is cut.
    """

    config: _decoder.Config
    steps: tuple[int, int] = (500, 250)
    size: int = 10
    length: int = 96
    windows: int = 96
    parts: tuple[tuple[str, float], ...] = (
        ("width", 0.5),
        ("depth", 0.5),
        ("both", 0.7),
        ("both", 0.5),
        ("both", 0.35),
    )
    rate: float = 4e-3


WHOLE = Plan(_decoder.Config())
QUICK = Plan(
    _decoder.Config(layers=2, width=64, heads=4, kv_heads=2, neurons=128),
    steps=(40, 20),
    size=8,
    length=32,
    windows=16,
    parts=(("both", 0.6),),
)


def count(params):
    """The number of parameters, compressed or not."""
    return sum(x.size for x in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "materialize")))


def cross_entropy(logits, labels):
    """Bits per character, by window."""
    found = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return found.mean(-1) / LOG2


def bits(fn, params, held):
    """Bits per character on text held out, and the standard error of the mean over windows."""
    run = jax.jit(lambda params, x: cross_entropy(fn(params, x[:, :-1])[0], x[:, 1:]))
    found = np.concatenate([run(params, x) for x in np.split(held, max(1, len(held) // 16))])
    return float(found.mean()), float(found.std() / len(found) ** 0.5)


def optimizer(plan, steps):
    schedule = optax.warmup_cosine_decay_schedule(0.0, plan.rate, max(steps // 20, 1), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def train(fn, params, plan, batches, steps):
    """Ordinary training on the next character."""
    tx = optimizer(plan, steps)

    @jax.jit
    def step(params, state, x):
        loss = lambda p: cross_entropy(fn(p, x[:, :-1])[0], x[:, 1:]).mean() * LOG2
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for x in batches:
        params, state = step(params, state, x)
    return params


# --- prune


def widths(graph, fn, params, batches, part, stay):
    """Masks of heads, neurons and features of the residual stream, by what flows through them."""
    stats = jp.calibrate(lambda p, x: fn(p, x)[0], params, [x[:, :-1] for x in batches])
    scores = jp.structure.activation_scores(graph, params, stats)
    return jp.structure.unit_masks(
        graph,
        unit_scores=scores,
        params=part,
        round_to=32,
        ignore=[*generation.whole(graph), *stay],
    )


def depths(graph, params, x, layers, scan):
    """Masks of whole blocks, those without which the loss rises least."""
    loss = lambda out: cross_entropy(out[0], x[:, 1:]).mean()
    pattern = None if scan else generation.BLOCK
    scores = jp.structure.layer_scores(
        graph, params, x[:, :-1], by="loss", loss=loss, pattern=pattern
    )
    return jp.structure.layer_masks(graph, layer_scores=scores, count=layers, pattern=pattern)


def pruned(kind, part, fn, params, plan, train_ids, scan=False):
    """Masks that keep a part of the parameters, by width, by depth, or by both."""
    calibration = list(_text.batches(train_ids, 4, size=plan.size, length=plan.length, seed=9))
    graph = jp.trace(fn, params, calibration[0][:, :-1])
    masks, stay = jax.tree.map(lambda _: jnp.array(True), params), []
    if kind != "width":
        share = 1 - part if kind == "depth" else (1 - part) / 2
        layers = max(1, round(share * plan.config.layers))
        masks = depths(graph, params, calibration[0], layers, scan)
        paths = {path for path, m in zip(*_flat(masks), strict=True) if not np.any(m)}
        stay = sorted({f"blocks/{path.split('/')[1]}/.*" for path in paths})
    if kind != "depth":
        gone = count(params) - count(jp.compact(fn, params, masks, calibration[0][:, :-1])[1])
        target = part + gone / count(params)
        if target < 1:  # else the layers alone were as much as the part asked for
            units = widths(graph, fn, params, calibration, target, stay)
            masks = jax.tree.map(jnp.logical_and, masks, units)
    return masks


def _flat(tree):
    items = jax.tree_util.tree_flatten_with_path(tree)[0]
    return ["/".join(str(k.key) for k in path) for path, _ in items], [leaf for _, leaf in items]


# --- recover


def recovered(small_fn, small, fn, teacher, plan, batches, steps):
    """Trained on the text and towards the probabilities of the dense one, trained on for as long."""
    kd = lambda s, t, x: jp.distill.kd(s.out[0], t.out[0], temperature=1.0).mean()
    task = lambda s, t, x: cross_entropy(s.out[0], x[:, 1:]).mean() * LOG2
    return jp.distill.recover(
        small_fn,
        small,
        fn,
        teacher,
        batches,
        optimizer(plan, steps),
        terms={"kd": (0.5, kd), "text": (0.5, task)},
        inputs=lambda x: (x[:, :-1],),
    )


# --- the page


@dataclass(frozen=True)
class Point:
    """A model on the plot.

    Attributes:
      params: its parameters.
      nbytes: what they hold.
      bits: bits per character, and the standard error of the mean over windows of text held out.
    """

    params: int
    nbytes: int
    bits: tuple[float, float]


def compare(plan, ids, held, scan):
    """Points by `(kind, part, state)`; and what the cut in both ways, nearest to a half, is made of."""
    fn, start = (_decoder.scanned if scan else _decoder.unscanned)(plan.config)
    data = lambda steps, seed: _text.batches(
        ids, steps, size=plan.size, length=plan.length, seed=seed
    )
    first, second = plan.steps
    found = {}

    def note(key, fn, params):
        found[key] = Point(count(params), jp.nbytes(params), bits(fn, params, held))
        print(
            f"{' '.join(map(str, key))}: {found[key].params:,} parameters, {found[key].bits[0]:.3f} bits"
        )

    params = train(fn, start, plan, data(first, 0), first)
    note(("dense", 1.0, "trained"), fn, params)
    longer = train(fn, params, plan, data(second, 1), second)
    note(("dense", 1.0, "trained on"), fn, longer)
    kept = {}
    for kind, part in plan.parts:
        masks = pruned(kind, part, fn, params, plan, ids, scan)
        small_fn, small = jp.compact(fn, params, masks, held[:1, :-1])
        note((kind, part, "cut"), small_fn, small)
        tuned = recovered(small_fn, small, fn, longer, plan, data(second, 1), second)
        note((kind, part, "recovered"), small_fn, tuned)
        kept[kind, part] = masks, small_fn, tuned
    best = min((key for key in kept if key[0] == "both"), key=lambda key: abs(key[1] - 0.5))
    masks, small_fn, tuned = kept[best]
    _, fresh = jp.compact(fn, start, masks, held[:1, :-1])
    fresh = train(small_fn, fresh, plan, data(first + second, 2), first + second)
    note((*best, "from scratch"), small_fn, fresh)
    for b in (8, 4):
        note(
            (*best, f"{b} bits"), jp.compressed(small_fn), generation.quantized(small_fn, tuned, b)
        )
    return found, (fn, params, masks, tuned)


def generate(plan, parts, prompt, length, folder, scan):
    """Generates with a small cache, from codes, here and in a fresh process.

    Returns:
      Token ids, those of the process that serves, and the largest difference of logits to the masked
      network of the dequantized weights.
    """
    fn, params, masks, tuned = parts
    cache = _decoder.empty_cache(plan.config, 1, len(prompt) + length, scan=scan)
    example = (jnp.zeros((1, 1), jnp.int32), cache, jnp.int32(0))
    small_fn, _ = jp.compact(fn, params, masks, *example, states=generation.STATES)
    tree = generation.quantized(small_fn.of(fn), tuned, 4)
    step = generation.next_token(jp.compressed(small_fn))
    short = small_fn.small_state("cache", cache)
    tokens, logits = generation.generated(jax.jit(step), tree, short, prompt, length)
    whole_again = generation.expanded(small_fn, jp.dequantize_tree(tree), params)
    text = np.concatenate([prompt, tokens])[None, :-1]
    expected = jax.jit(fn)(whole_again, text)[0][0, len(prompt) - 1 :]
    again = generation.served(folder, step, tree, short, prompt, length)
    return tokens, again, float(jnp.max(jnp.abs(logits - expected)))


def table(found):
    rows = Table(title="Characters of text held out")
    for column in ("model", "parameters", "in memory", "bits per character", "of dense trained on"):
        rows.add_column(column, justify="left" if column == "model" else "right")
    base = found["dense", 1.0, "trained on"].bits[0]
    for (kind, part, state), p in found.items():
        name = f"{kind}, {state}" if kind == "dense" else f"{kind} to {part:.0%}, {state}"
        change = f"{p.bits[0] / base - 1:+.1%}"
        bits_of = f"{p.bits[0]:.3f} ± {p.bits[1]:.3f}"
        rows.add_row(name, f"{p.params:,}", human_bytes(p.nbytes), bits_of, change)
    return rows


def speed_table(title, measured):
    rows = Table(title=title)
    for column in ("model", "tokens per second", "of dense", "parameters", "KV cache"):
        rows.add_column(column, justify="left" if column == "model" else "right")
    base = measured["dense"][0]
    for name, (rate, weights, cache) in measured.items():
        sizes = human_bytes(weights), human_bytes(cache)
        rows.add_row(name, f"{rate:,.0f}", f"{rate / base:.2f}x", *sizes)
    return rows


def plot(path, found, title):
    """Bits per character against parameters, and against bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = {"width": ("C0", "s"), "depth": ("C1", "^"), "both": ("C2", "o"), "dense": ("k", "D")}
    dense = found["dense", 1.0, "trained"]
    draw = lambda axes, x, points, **how: axes.errorbar(
        x, [p.bits[0] for p in points], [p.bits[1] for p in points], capsize=3, **how
    )
    for kind in ("width", "depth", "both"):
        for state, line, face in (("cut", ":", "none"), ("recovered", "-", None)):
            first = dense if state == "cut" else found["dense", 1.0, "trained on"]
            points = [first, *(p for k, p in found.items() if k[0] == kind and k[2] == state)]
            color, marker = styles[kind]
            how = {"mfc": face} if face else {}
            label = f"{kind}, {'cut alone' if state == 'cut' else 'and recovered'}"
            if len(points) > 1:
                x = [p.params / 1e3 for p in points]
                draw(left, x, points, color=color, marker=marker, ls=line, label=label, **how)
    for key, p in found.items():
        if key[2] == "from scratch":
            draw(
                left,
                [p.params / 1e3],
                [p],
                color="C3",
                marker="x",
                ls="",
                label="both, from scratch",
            )
        if key[2] == "trained on":
            draw(
                left, [p.params / 1e3], [p], color="k", marker="D", ls="", label="dense, trained on"
            )
            left.axhline(1.03 * p.bits[0], color="0.6", lw=0.8, ls="--")
            left.text(
                left.get_xlim()[0], 1.03 * p.bits[0], " +3 %", color="0.4", va="bottom", size=8
            )
    floats = [
        p
        for k, p in found.items()
        if k[2] in ("trained on", "recovered") and k[0] in ("dense", "both")
    ]
    draw(
        right,
        [p.nbytes / 1e6 for p in floats],
        floats,
        color="C2",
        marker="o",
        label="both, 32 bits",
    )
    for b, color in ((8, "C4"), (4, "C5")):
        points = [p for k, p in found.items() if k[2] == f"{b} bits"]
        x = [p.nbytes / 1e6 for p in points]
        draw(right, x, points, color=color, marker="*", ms=10, ls="", label=f"both, {b} bits")
    cut = [p.bits[0] for k, p in found.items() if k[2] != "cut"]
    low, high = min(cut), max(cut)
    left.set_ylim(low - 0.6 * (high - low), high + 5 * (high - low))
    left.set(xlabel="parameters (thousands)", ylabel="bits per character, text held out")
    right.set(xlabel="parameters in memory (MB)", xlim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{title}; bars: standard error over windows of text", fontsize=10)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a file of plain text; by default the Python reference")
    parser.add_argument("--scanned", action="store_true", help="stacked blocks under a scan")
    parser.add_argument("--quick", action="store_true", help="a small network, trained for seconds")
    parser.add_argument("--plot", help="a file to draw to")
    how = parser.parse_args(argv)
    plan = QUICK if how.quick else WHOLE
    ids, test, characters = _text.load(how.text)
    held = _text.windows(test, count=plan.windows, length=plan.length)
    found, parts = compare(plan, ids, held, how.scanned)
    console = Console()
    console.print(table(found))
    with tempfile.TemporaryDirectory() as folder:
        length = 20 if how.quick else 120
        tokens, again, difference = generate(
            plan, parts, test[:16], length, Path(folder), how.scanned
        )
    show = lambda ids: repr("".join(characters[i] for i in ids))
    print(f"{show(test[:16])} goes on {show(tokens)}, in 4 bits with a small cache")
    print(f"the same in a fresh process: {tokens == again}; logits differ by {difference:.1e}")
    title = "Decoding at batch 1, this network"
    measured = [generation.speeds(*parts[:3], plan.config, how.scanned)]
    console.print(speed_table(title, measured[0]))
    if not how.quick:
        c, *rest = generation.larger(how.scanned)
        measured.append(generation.speeds(*rest, c, how.scanned))
        console.print(
            speed_table("Decoding at batch 1, 25 M parameters, never trained", measured[1])
        )
    if how.plot:
        plot(
            how.plot, found, f"A decoder on {'the Python reference' if not how.text else how.text}"
        )
    return found, measured, (tokens == again, difference)


if __name__ == "__main__":
    main()
