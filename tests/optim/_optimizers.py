"""Every optimizer of optax, and every wrapper, as the contract runs them."""

import jax
import optax

RATE = 0.1
_ALIASES = [
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw",
    "adan", "amsgrad", "fromage", "lamb", "lars", "lion", "nadam", "nadamw", "novograd",
    "optimistic_adam_v2", "optimistic_gradient_descent", "radam", "rmsprop", "rprop", "sgd",
    "sign_sgd", "signum", "sm3", "yogi",
]  # fmt: skip
_CONTRIB = [
    "acprop", "ademamix", "simplified_ademamix", "adopt", "cocob", "dadapt_adamw", "dog",
    "dowg", "galore", "madgrad", "momo", "momo_adam", "muon", "prodigy", "schedule_free_adamw",
    "schedule_free_sgd",
]  # fmt: skip

OPTIMIZERS = {
    **{name: lambda name=name: getattr(optax, name)(RATE) for name in _ALIASES},
    **{
        f"contrib.{name}": lambda name=name: getattr(optax.contrib, name)(RATE) for name in _CONTRIB
    },
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=jax.random.key(0)),
    "optimistic_adam": lambda: optax.optimistic_adam(RATE, optimism=RATE),
    "polyak_sgd": optax.polyak_sgd,
    "lbfgs": optax.lbfgs,
    "contrib.mechanize": lambda: optax.contrib.mechanize(optax.adam(RATE)),
    "contrib.sam": lambda: optax.contrib.sam(optax.sgd(RATE), optax.sgd(0.01)),
    "contrib.sophia": lambda: optax.contrib.sophia(RATE),
    "contrib.split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(
        optax.adam(RATE)
    ),
    "contrib.reduce_on_plateau": lambda: optax.chain(
        optax.adam(RATE), optax.contrib.reduce_on_plateau()
    ),
}
# needs gradients of single examples
NOT_RUN = {"contrib.dpsgd"}
# optax alone fails on these with float16 gradients of float32 weights
NO_FLOAT16 = {
    "adafactor": "not finite where gradients are 0",
    "adan": "its state changes dtype",
    "contrib.galore": "its branches differ in dtype",
    "lbfgs": "its state changes dtype",
    "optimistic_gradient_descent": "its state changes dtype",
}

_GROUPS = {"w": "weights", "b": "biases"}
_SPLIT = lambda tx: {"weights": tx, "biases": optax.sgd(RATE)}
WRAPPERS = {
    "chain, first": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "chain, followed by a learning rate": lambda tx: optax.chain(tx, optax.scale(-0.5)),
    "chain, followed by weight decay": lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
    "multi_transform": lambda tx: optax.multi_transform(_SPLIT(tx), _GROUPS),
    "partition": lambda tx: optax.partition(_SPLIT(tx), _GROUPS),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "flatten": optax.flatten,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step > 0),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: tx)(rate=RATE),
    "lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "named_chain": lambda tx: optax.named_chain(("tx", tx)),
}
