"""Lottery tickets: a tenth of a network trains as well as all of it, if it begins where the whole began.

    pip install "jaxprune[demo]"
    python examples/lottery_tickets.py

Each round prunes what was trained and goes back to an early step. Rounds are saved as they end: run the
script again after a break, and it goes on.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import optax
from _images import batches, mnist
from flax import linen as nn

import jaxprune as jp


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(300)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(nn.relu(nn.Dense(100)(x)))


def trainer(steps):
    """What `jp.optim.lottery` calls: from one step to another, under masks."""
    (images, labels), _ = mnist()

    def train(params, masks, start, stop):
        tx = jp.masked_update(optax.adam(1e-3), masks)

        def loss(params, x, y):
            logits = MLP().apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        @jax.jit
        def step(params, state, x, y):
            updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for rows in batches(steps)[start:stop]:  # the same batches in every round
            params, state = step(params, state, images[rows], labels[rows])
        return params

    return train


def main(folder="lottery", steps=400, rounds=4):
    _, (images, labels) = mnist()
    right = lambda p: float(np.mean(MLP().apply({"params": p}, images).argmax(-1) == labels))
    params = MLP().init(jax.random.key(0), images[:1])["params"]
    train, saved = trainer(steps), Path(folder)
    saved.mkdir(exist_ok=True)
    done = sorted(saved.glob("round*"))
    last = jp.export.load(done[-1]) if done else None
    last = None if last is None else jp.optim.Ticket(*last)
    for ticket in jp.optim.lottery(train, params, 0.95, rounds=rounds, rewind=20, resume=last):
        jp.export.save(saved / f"round{int(ticket.round):02d}", ticket)
        zeros = jp.sparsity(ticket.params, where=".*kernel")
        print(
            f"round {int(ticket.round)}: {100 * zeros:.1f} % zero, "
            f"{100 * right(ticket.params):.1f} % right"
        )
        last = ticket
    other = MLP().init(jax.random.key(7), images[:1])["params"]
    lost = right(train(jp.apply_masks(other, last.masks), last.masks, 0, None))
    print(f"the same connections from other weights: {100 * lost:.1f} % right")
    return right(last.params), lost, jp.sparsity(last.masks)


if __name__ == "__main__":
    main(*sys.argv[1:2])
