# SPDX-License-Identifier: Apache-2.0
"""The tier on the hosts' own storage, in one process: what is newest and sound is gone on from, and
no other run's."""

import json
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.core import config as configs
from align_jax.core.options import CheckpointOptions
from align_jax.parallel.mesh import make_mesh
from align_jax.storage import checksums, local_tier
from align_jax.storage.checkpoint import Checkpoints


def _mesh(**sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def _state(mesh, seed=0):
    values = {
        "kernel": jax.random.normal(jax.random.key(seed), (64, 32)).at[0, 0].set(-0.0),
        "bias": jnp.full((32,), seed, jnp.bfloat16),
        "flags": jnp.arange(4) % 2 == 0,
        "step": jnp.int32(seed),
    }
    specs = {"kernel": ("fsdp", "tensor"), "bias": ("tensor",), "flags": (), "step": ()}
    return {
        name: jax.device_put(
            value, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*specs[name]))
        )
        for name, value in values.items()
    }


def _abstract(mesh):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(mesh)
    )


def _equal(first, second):
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(
            np.asarray(checksums.bits_of(x)), np.asarray(checksums.bits_of(y))
        ),
        first,
        second,
    )


@pytest.fixture
def mesh():
    return _mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture
def opened(tmp_path):
    def open_(digest="a"):
        options = CheckpointOptions(
            every_steps=4, keep=3, local=str(tmp_path / "local"), local_every_steps=2
        )
        return Checkpoints(tmp_path / "run", options, digest=digest)

    return open_


def _steps(tmp_path):
    return {
        int(path.name): path for path in tmp_path.glob("local/run-*/0/*") if path.name.isdigit()
    }


def _fill(opened, mesh, last=10):
    """Save as the training loop does, up to a step between two persistent saves."""
    with opened() as checkpoints:
        for step in range(1, last + 1):
            if tier := checkpoints.due(step):
                checkpoints.save(step, _state(mesh, step), {"num_tokens": step * 10}, tier=tier)


def _replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _flip_a_bit(step):
    largest = max(step.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 3] ^= 4
    largest.write_bytes(bytes(data))


def test_the_newest_of_both_tiers_is_gone_on_from_bit_for_bit(opened, mesh, tmp_path):
    _fill(opened, mesh)
    assert sorted(_steps(tmp_path)) == [8, 10]
    with opened() as checkpoints:
        assert (
            checkpoints.steps() == [4, 8]
            and checkpoints.resumable() == [4, 8, 10]
            and checkpoints.last_good() == 10
        )
        restored = checkpoints.restore(_abstract(mesh))
        assert (restored.step, restored.extra, restored.own) == (10, {"num_tokens": 100}, True)
        _equal(restored.state, _state(mesh, 10))
        assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(
            lambda x: x.sharding, _abstract(mesh)
        )
        checkpoints.save(12, _state(mesh, 12), tier="persistent", wait=True)
    _flip_a_bit(_steps(tmp_path)[12])  # the one before is sound, but older than the persistent one
    with opened() as checkpoints:
        restored = checkpoints.restore(_abstract(mesh))
        assert restored.step == 12 and restored.path == str(tmp_path / "run/checkpoints/12")


def test_the_state_may_be_donated_as_soon_as_a_local_save_returns(opened, mesh):
    with opened() as checkpoints:
        state = _state(mesh, 3)
        checkpoints.save(2, state, tier="local")
        state = jax.jit(
            lambda s: jax.tree.map(lambda x: x ^ x if x.dtype == bool else x * x.dtype.type(0), s),
            donate_argnums=0,
        )(state)
        jax.block_until_ready(state)
    with opened() as checkpoints:
        _equal(checkpoints.restore(_abstract(mesh)).state, _state(mesh, 3))


CORRUPTIONS = {
    "flipped bit": _flip_a_bit,
    "another count": lambda step: _replace(
        step / "record/metadata", '"num_tokens": 100', '"num_tokens": 101'
    ),
    "no record": lambda step: (step / "record/metadata").unlink(),
    "broken record": lambda step: (step / "record/metadata").write_text("{"),
    "no data": lambda step: [path.unlink() for path in step.glob("state/**/d/*")],
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupt_newest_local_checkpoint_is_named_and_the_one_before_used(
    opened, mesh, tmp_path, caplog, kind
):
    _fill(opened, mesh, last=11)
    CORRUPTIONS[kind](_steps(tmp_path)[10])
    with opened() as checkpoints:
        assert checkpoints.restore(_abstract(mesh)).step == 8
    assert "local checkpoint of step 10" in caplog.text and "not used" in caplog.text
    assert sorted(_steps(tmp_path)) == [8]


def test_a_corrupt_persistent_checkpoint_leaves_the_local_one_before_it(opened, mesh, tmp_path):
    _fill(opened, mesh, last=8)
    _flip_a_bit(_steps(tmp_path)[8])
    _flip_a_bit(tmp_path / "run/checkpoints/8")
    with opened() as checkpoints:
        restored = checkpoints.restore(_abstract(mesh))
        assert restored.step == 6 and checkpoints.steps() == [4]
        _equal(restored.state, _state(mesh, 6))


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(digest="b"), "another run, configuration or past"),
        (dict(mesh=dict(fsdp=8)), "saved on the mesh"),
        (dict(leaf="more"), "other arrays"),
    ],
)
def test_what_another_configuration_or_mesh_has_left_is_named_and_not_used(
    opened, mesh, tmp_path, caplog, other, message
):
    _fill(opened, mesh)
    mesh = _mesh(**other["mesh"]) if "mesh" in other else mesh
    wanted = _abstract(mesh)
    if "leaf" in other:
        with (
            opened() as checkpoints,
            pytest.raises(ValueError, match="more: not in the checkpoint"),
        ):
            checkpoints.restore(wanted | {"more": wanted["step"]})
    else:
        with opened(digest=other.get("digest", "a")) as checkpoints:
            assert checkpoints.restore(wanted).step == 8
    assert message in caplog.text and not _steps(tmp_path)


def test_a_workdir_begun_anew_does_not_go_on_from_what_the_hosts_still_hold(
    opened, mesh, tmp_path, caplog
):
    _fill(opened, mesh)
    (tmp_path / "run").rename(tmp_path / "old")
    with opened() as checkpoints:
        assert checkpoints.restore(_abstract(mesh)) is None
    assert "another run, configuration or past" in caplog.text


def test_going_back_leaves_the_local_steps_behind_even_those_of_a_host_that_was_away(
    opened, mesh, tmp_path
):
    _fill(opened, mesh)
    kept = {step: path.rename(tmp_path / str(step)) for step, path in _steps(tmp_path).items()}
    with opened() as checkpoints:
        assert checkpoints.restore(_abstract(mesh), "4", rewind=True).step == 4
        checkpoints.save(6, _state(mesh, 66), tier="local")
    host = next(tmp_path.glob("local/run-*/0"))
    for step, path in kept.items():
        path.rename(host / str(step))  # the host is back
    with opened() as checkpoints:
        # the same command, restarted
        restored = checkpoints.restore(_abstract(mesh), "4", rewind=True)
        assert restored.step == 6
        _equal(restored.state, _state(mesh, 66))


def test_a_run_begun_from_anothers_checkpoint_goes_on_from_its_own_local_one(
    opened, mesh, tmp_path
):
    with Checkpoints(tmp_path / "first", CheckpointOptions(every_steps=0)) as checkpoints:
        checkpoints.save(12, _state(mesh, 12), wait=True)
    with opened() as checkpoints:
        restored = checkpoints.restore(_abstract(mesh), str(tmp_path / "first"))
        assert restored.step == 12 and not restored.own
        checkpoints.save(2, _state(mesh, 2), tier="local")
    with opened() as checkpoints:
        restored = checkpoints.restore(_abstract(mesh), str(tmp_path / "first"))
        assert restored.step == 2 and restored.own


def test_a_failing_local_disk_is_named_then_left_alone_and_the_run_goes_on(
    opened, mesh, tmp_path, monkeypatch, caplog
):
    real = os.rename

    def rename(source, target):
        if "local" in str(source):
            raise OSError("No space left on device")
        return real(source, target)

    with opened() as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr("os.rename", rename)
            for step in (1, 2, 3):
                assert checkpoints._local.due(2)
                checkpoints.save(step, _state(mesh, step), tier="local")
            checkpoints._local.wait()
        assert caplog.text.count("No space left") >= 3 and "no more are tried" in caplog.text
        assert not any("tmp" in path.name for path in tmp_path.glob("local/run-*/0/*"))
        assert not checkpoints._local.due(2) and checkpoints.due(4) == "persistent"
        checkpoints.save(4, _state(mesh, 4), wait=True)
        assert checkpoints.restore(_abstract(mesh)).step == 4 and not _steps(tmp_path)


def test_each_shard_is_given_by_whoever_holds_it_bit_for_bit(mesh):
    state = _state(mesh, 1)
    for array in state.values():
        shared = jax.jit(lambda x: x, out_shardings=array.sharding)(array)
        _equal(local_tier._share_shards(shared, (0,)), array)
    sharding = state["kernel"].sharding
    sources = local_tier._source_devices(sharding, (64, 32), (0,))
    assert len(sources) == 4 and not local_tier._source_devices(sharding, (64, 32), (1,))


def test_the_record_says_where_each_device_stood_and_what_it_held(opened, mesh, tmp_path):
    _fill(opened, mesh, last=2)
    record = json.loads((_steps(tmp_path)[2] / "record/metadata").read_text())
    assert record["positions"] == list(range(8)) and np.shape(record["shard_checksums"]) == (8, 4)
    assert (
        record["mesh"]["fsdp"] == 2
        and record["processes"] == 1
        and record["extra"] == {"num_tokens": 20}
    )


def test_a_folder_that_cannot_be_written_and_a_bucket_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint.local: expected a folder on every host"):
        Checkpoints(tmp_path / "run", CheckpointOptions(local=str(tmp_path / "file")))
    config = configs.defaults()
    config.checkpoint.local = "gs://bucket/local"
    config.checkpoint.local_every_steps = 500
    with pytest.raises(
        ValueError,
        match="(?s)checkpoint.local = 'gs://bucket/local': expected a "
        "folder.*"
        "local_every_steps = 500: expected less than "
        "checkpoint.every_steps = 500",
    ):
        configs.read(config)


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING)
