# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoints, opened as its config says."""

import jax
import jax.numpy as jnp
import pytest

from align_jax.core import config as configs
from align_jax.interop import hf
from align_jax.models.model import build
from align_jax.parallel.mesh import make_mesh
from align_jax.runs import memory, trained, weights


@pytest.mark.parametrize("metric, best", [("eval/loss", 1), ("-eval/loss", 2)])
def test_a_minus_keeps_the_checkpoint_of_the_smallest_metric(tmp_path, metric, best):
    config = configs.defaults()
    config.checkpoint.update(every_steps=1, keep=1, best_metric=metric)
    state = {"step": jax.device_put(jnp.int32(0), jax.devices()[0])}
    with trained.open_checkpoints(configs.parse(config), str(tmp_path)) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            assert checkpoints.save(step, state, metrics={"eval/loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [best, 3]
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        assert checkpoints.restore(wanted, "best").step == best


def test_weights_that_no_device_can_hold_are_refused_by_their_bytes(tmp_path, monkeypatch):
    config = hf.config_from(
        dict(
            model_type="llama",
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    hf.save(str(tmp_path), config, build(config).init(jax.random.key(0)))
    monkeypatch.setattr(memory, "capacity", lambda mesh: 2**14)
    with pytest.raises(ValueError, match=r"GiB on each of 2 devices, which has") as error:
        weights.load_model(str(tmp_path), mesh=make_mesh({"fsdp": 2}, jax.devices()[:2]))
    assert str(error.value).startswith(f"the weights of {tmp_path} take")
    assert str(error.value).endswith("more devices, or --dtype=bfloat16 beside --model")
    # a run's weights are of its own type: no flag changes it
    with pytest.raises(ValueError, match="more devices$"):
        memory.check_weights(
            jax.device_put(jnp.zeros(2**14)), make_mesh({"fsdp": 1}, jax.devices()[:1]), "run"
        )
