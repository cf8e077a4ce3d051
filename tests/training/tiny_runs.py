# SPDX-License-Identifier: Apache-2.0
"""Two tiny models, batches of random tokens, and a few steps over any mesh: compiled once for each
setting.

Every size that a mesh axis splits is a multiple of eight.  Weights are large enough for answers to
differ, and Adam's epsilon for an update not to hang on the last bits of a gradient that is nearly
nothing: by default 1e-8 in the denominator makes a gradient's rounding of 1e-9 a tenth of a
learning rate.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import numpy as np

from align_jax import losses
from align_jax.core.options import Config, ModelOptions, OptimizerOptions, ReferenceOptions
from align_jax.core.schema import Batch
from align_jax.interop import hf
from align_jax.models.lora import ATTENTION_AND_MLP, LoraConfig
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import put_batch
from align_jax.runs import weights
from align_jax.training import initialize, optim, partitioning
from align_jax.training.steps import StepSpec

SIZES = dict(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=4,
    max_position_embeddings=32,
    initializer_range=0.3,
)
MODELS = {
    "dense": hf.config_from(SIZES | dict(model_type="llama")),
    "experts": hf.config_from(
        SIZES | dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    ),
}
TARGETS = {"dense": ATTENTION_AND_MLP, "experts": "attention/.*"}  # experts take no adapter


COMPUTED = ModelOptions(compute_dtype="float32", attention="xla")
ADAMW = OptimizerOptions(learning_rate=1e-2, schedule="constant", eps=1e-3)


def put(tree, specs):
    """Lay arrays where the specs say."""
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, specs))


def random_batch(
    seed: int, *, responses: int = 2, groups: int = 16, length: int = 16, kind: str = "pairs"
) -> Batch:
    """Rows of one response each, of random lengths, the last group a filler."""
    rng = np.random.default_rng(seed)
    rows = groups * responses
    index = np.broadcast_to(np.arange(length), (rows, length)).astype(np.int32)
    ends, starts = rng.integers(6, length + 1, (rows, 1)), rng.integers(2, 5, (rows, 1))
    real = index < ends
    loss_mask = real & (index >= starts)
    order = np.argsort(~loss_mask, axis=1, kind="stable").astype(np.int32)
    counts = loss_mask.sum(axis=1)
    weight = np.ones(groups, np.float32)
    weight[-1] = 0.0
    last = (ends[:, 0] - 1).astype(np.int32).reshape(groups, responses)
    return Batch(
        tokens=np.where(real, rng.integers(1, 64, (rows, length)), 0).astype(np.int32),
        segment_ids=real.astype(np.int32),
        positions=np.where(real, index, 0).astype(np.int32),
        source_index=np.maximum(index - 1, 0),
        loss_mask=loss_mask,
        slot=np.zeros((rows, length), np.int32),
        loss_index=np.where(np.arange(length)[None] < counts[:, None], order, length).astype(
            np.int32
        ),
        lengths=counts.reshape(groups, responses).astype(np.int32),
        weight=weight,
        last_index=last,
        label=rng.random(groups) < 0.6 if kind == "unpaired" else None,
        mismatched=random_batch(seed + 1000, responses=1, groups=groups, length=length)
        if kind == "unpaired"
        else None,
    )


def step_spec_of(
    name: str,
    model: str = "dense",
    rank: int = 0,
    microbatches: int = 1,
    options: tuple = (),
    chunk: int = 4,
    dropout: float = 0.0,
    optimizer: OptimizerOptions = ADAMW,
    **spec_options,
) -> StepSpec:
    """Make the step spec of an objective on one of the models; rank 0 trains all of it."""
    terms = losses.resolve(name, dict(options))
    lora = LoraConfig(rank, dropout=dropout, targets=TARGETS[model]) if rank else None
    models = initialize.make_models(MODELS[model], terms, COMPUTED, lora)
    schedule = optim.make_schedule(optimizer, total_steps=10)
    return StepSpec(
        models.policy,
        models.base,
        terms,
        optim.make_optimizer(optimizer, schedule, models.policy.roles()),
        schedule,
        microbatches=microbatches,
        chunk=chunk,
        load_balancing=0.02 if model == "experts" else 0.0,
        **spec_options,
    )


def state_specs_of(spec: StepSpec, mesh: jax.sharding.Mesh) -> initialize.StateSpecs:
    """Say what lies where, all in float32."""
    return initialize.make_state_specs(spec, mesh, COMPUTED, ReferenceOptions(dtype="float32"))


@functools.cache
def weights_of(*arguments, **options):
    """Draw the starting weights of ``step_spec_of(...)`` on one device; return (frozen, trained),
    numpy."""
    spec, mesh = step_spec_of(*arguments, **options), make_mesh({"data": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        specs = state_specs_of(spec, mesh)
        frozen = weights.load_frozen(spec, specs, Config())
        return jax.device_get((frozen, weights.load_trained(spec, specs, frozen, Config())))


def once(function: Callable) -> Callable:
    """Remember a function's results by its arguments, defaults and keywords laid out: tests ask for
    the same run in many ways."""
    kept, signature = functools.cache(function), inspect.signature(function)

    @functools.wraps(function)
    def called(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        return kept(*bound.args, **bound.kwargs)

    return called


@once
def steps_of(
    name: str,
    mesh: tuple = (),
    microbatches: int = 1,
    rank: int = 0,
    devices: int = 1,
    steps: int = 5,
    model: str = "dense",
    options: tuple = (),
    ahead: bool = False,
    **spec_options,
):
    """Train for a few steps; return (each step's metrics, the trained parameters, the compiled
    step, its parts).

    ``ahead`` compiles the step before it is called, for its text to be read.
    """
    spec = step_spec_of(name, model, rank, microbatches, options, **spec_options)
    device_mesh = make_mesh(dict(mesh) or {"data": 1}, jax.devices()[:devices])
    kind = spec.terms[0].objective.data
    batches = [
        random_batch(number, responses=1 if kind == "unpaired" else 2, kind=kind)
        for number in range(steps)
    ]
    with jax.set_mesh(device_mesh):
        specs = state_specs_of(spec, device_mesh)
        frozen, trained = weights_of(name, model, rank, options=options, **spec_options)
        frozen = put(frozen, specs.frozen)
        state = initialize.first_state(spec, specs, put(trained, specs.trained))
        step = partitioning.jit_train_step(spec, specs.state, device_mesh)
        if ahead:
            step = step.lower(state, frozen, put_batch(device_mesh, batches[0])).compile()
        metrics = []
        for batch in batches:
            batch = put_batch(device_mesh, batch)
            with jax.transfer_guard("disallow"):
                state, values = step(state, frozen, batch)
            metrics.append({key: float(value) for key, value in values.items()})
        return metrics, jax.device_get(state["params"]), step, (specs, spec, device_mesh, batch)
