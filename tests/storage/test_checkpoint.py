# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact, resharded, checked; damage and a failing store are named and survived."""

import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax.core import config as configs
from align_jax.core import files
from align_jax.core.options import CheckpointOptions
from align_jax.parallel.mesh import make_mesh
from align_jax.storage import checkpoint, checksums
from align_jax.storage.checkpoint import Checkpoints
from align_jax.storage.multihost import StorageError

OPTIONS = CheckpointOptions(every_steps=0, keep=3)
SCORED = CheckpointOptions(every_steps=0, keep=3, best_metric="eval/loss")
SPECS = {"kernel": ("fsdp", "tensor"), "bias": ("tensor",)}


def _mesh(**sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def _state(mesh, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "layer": {
            "kernel": jax.random.normal(keys[0], (64, 64)),  # most of what is stored
            "bias": jax.random.normal(keys[1], (64,)).astype(jnp.bfloat16),
        }
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3), {"layer": {"kernel": True, "bias": False}}),
    )
    state = {
        "step": jnp.int32(seed),
        "params": params,
        "opt_state": optimizer.init(params),
        "running": {},
    }
    return jax.device_put(state, _shardings(mesh, state))


def _shardings(mesh, state):
    def sharding(path, leaf):
        axes = SPECS.get(checksums.leaf_name(path).rsplit("/", 1)[-1], ()) if leaf.ndim else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _abstract(mesh, state):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        _shardings(mesh, state),
    )


def _equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), first, second
    )


@pytest.fixture
def mesh():
    return _mesh(data=2)


def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path, mesh):
    state = _state(mesh, 7)
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        assert checkpoints.save(7, state, {"data_step": 7, "num_tokens": 123})
    wanted = _abstract(_mesh(fsdp=2, tensor=2), state)
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        restored = checkpoints.restore(wanted)
    assert (restored.step, restored.extra) == (7, {"data_step": 7, "num_tokens": 123})
    _equal(state, restored.state)
    assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(
        lambda x: x.sharding, wanted
    )


def test_a_save_in_the_background_reads_the_state_before_it_is_donated(tmp_path, mesh):
    state = _state(mesh, 3)
    kept = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        checkpoints.save(3, state)
        state = jax.jit(lambda s: jax.tree.map(lambda x: x * x.dtype.type(0), s), donate_argnums=0)(
            state
        )
        jax.block_until_ready(state)
        checkpoints.wait()
        _equal(kept, checkpoints.restore(_abstract(mesh, state)).state)


def test_an_empty_workdir_restores_nothing(tmp_path, mesh):
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        assert checkpoints.restore(_abstract(mesh, _state(mesh))) is None
        assert checkpoints.last_good() is None


def test_the_newest_and_the_best_are_kept(tmp_path, mesh):
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: None, 5: 0.5, 6: None}
    with Checkpoints(
        tmp_path, CheckpointOptions(keep=2, best_metric="eval/accuracy")
    ) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(
                step,
                _state(mesh, step),
                metrics=None if score is None else {"eval/accuracy": score},
            )
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.restore(_abstract(mesh, _state(mesh)), "best").step == 2
        assert checkpoints.restore(_abstract(mesh, _state(mesh)), 5).step == 5
        with pytest.raises(KeyError, match="best_metric = 'eval/accuracy' is not among"):
            checkpoints.save(7, _state(mesh), metrics={"eval/loss": 1.0})


def test_the_best_may_be_the_smallest(tmp_path, mesh):
    with Checkpoints(tmp_path, CheckpointOptions(keep=1, best_metric="-eval/loss")) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            checkpoints.save(step, _state(mesh, step), metrics={"eval/loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.restore(_abstract(mesh, _state(mesh)), "best").step == 2


def _truncate(step):
    largest = max(
        (path for path in step.glob("state/**/d/*")), key=lambda path: path.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def _flip_a_bit(step):
    """Flip one bit of an array's data, which no format check of the store notices."""
    largest = max(
        (path for path in step.glob("state/**/d/*")), key=lambda path: path.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 3] ^= 4
    largest.write_bytes(bytes(data))


def _replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CORRUPTIONS = {
    "truncated": _truncate,
    "flipped bit": _flip_a_bit,
    "no arrays": lambda step: shutil.rmtree(step / "state"),
    "no data": lambda step: [shutil.rmtree(path) for path in step.glob("state/**/d")],
    "no tree": lambda step: (step / "state/_METADATA").unlink(),
    "broken json": lambda step: (step / "extra/metadata").write_text("{"),
    "empty manifest": lambda step: (step / "state/manifest.ocdbt").write_text(""),
    "no metadata": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "emptied": lambda step: [
        shutil.rmtree(path) if path.is_dir() else path.unlink() for path in step.iterdir()
    ],
    "no metrics": lambda step: (step / "metrics/metrics").unlink(),
    "broken metrics": lambda step: (step / "metrics/metrics").write_text("{"),
    "metrics of text": lambda step: (step / "metrics/metrics").write_text('{"eval/loss": "1"}'),
    "another position": lambda step: _replace(
        step / "extra/metadata", '"position": 7', '"position": 8'
    ),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupt_newest_checkpoint_is_set_aside_and_the_one_before_used(
    tmp_path, mesh, caplog, kind
):
    with Checkpoints(tmp_path, SCORED, backoff_seconds=0.0) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(mesh, step), {"position": 7}, metrics={"eval/loss": 1.0})
    CORRUPTIONS[kind](tmp_path / "checkpoints/2")
    with Checkpoints(tmp_path, SCORED, backoff_seconds=0.0) as checkpoints:
        restored = checkpoints.restore(_abstract(mesh, _state(mesh)))
        if restored.step == 2:  # what was corrupted is not needed: the state itself is proved sound
            assert kind in ("no metadata", "no metrics", "broken metrics", "metrics of text")
            _equal(restored.state, _state(mesh, 2))
            return
        assert restored.step == 1
        _equal(restored.state, _state(mesh, 1))
        assert "step 2 is corrupt" in caplog.text
        assert (tmp_path / "checkpoints/corrupt-2").is_dir() and checkpoints.steps() == [1]
        assert checkpoints.save(2, _state(mesh, 2), metrics={"eval/loss": 1.0}, wait=True)


def test_a_checkpoint_that_the_run_cannot_go_on_from_is_set_aside(tmp_path, mesh, caplog):
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(mesh, step), {"file": f"rollouts/{step}"})
    (tmp_path / "checkpoints/notes.txt").write_text("mine")
    (tmp_path / "checkpoints/mine").mkdir()

    def usable(extra):
        return "rollouts/2 is lost" if extra["file"] == "rollouts/2" else ""

    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        restored = checkpoints.restore(_abstract(mesh, _state(mesh)), usable=usable)
    assert restored.step == 1 and "rollouts/2 is lost" in caplog.text
    assert (tmp_path / "checkpoints/corrupt-2").exists()
    assert (tmp_path / "checkpoints/notes.txt").exists()


def _listing(folder):
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_reading_leaves_a_run_s_folder_as_it_is_and_passes_over_what_is_gone(
    tmp_path, mesh, monkeypatch
):
    states = {step: _state(mesh, step) for step in (1, 2, 3, 4)}
    with Checkpoints(tmp_path, SCORED) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, metrics={"eval/loss": float(step)}, wait=True)
    folder = tmp_path / "checkpoints"
    (folder / "5.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # a save that is going on
    (folder / "2/metrics/metrics").write_text("{")
    CORRUPTIONS["broken json"](folder / "4")
    before = _listing(tmp_path)
    abstract = _abstract(mesh, states[1])
    with Checkpoints(tmp_path, SCORED, reading=True) as checkpoints:
        assert checkpoints.restore(abstract).step == 3  # 4 is corrupt
        assert checkpoints.restore(abstract, "best").step == 3
        assert _listing(tmp_path) == before
        read = checkpoint._read_here

        def removed(path, *given):  # by the run, which keeps a few alone
            (folder / path.name).rename(tmp_path / "gone")
            return read(path, *given)

        monkeypatch.setattr(checkpoint, "_read_here", removed)
        with pytest.raises(FileNotFoundError, match="3 was removed while it was read"):
            checkpoints.restore(abstract, 3)


def test_a_corrupt_checkpoint_asked_for_by_name_is_an_error(tmp_path, mesh):
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        checkpoints.save(1, _state(mesh, 1), wait=True)
        checkpoints.save(2, _state(mesh, 2), wait=True)
        _flip_a_bit(tmp_path / "checkpoints/1")
        with pytest.raises(ValueError, match="checkpoints/1 is corrupt"):
            checkpoints.restore(_abstract(mesh, _state(mesh)), 1)
        _flip_a_bit(tmp_path / "checkpoints/2")
        with pytest.raises(ValueError, match="every checkpoint in .* is corrupt"):
            checkpoints.restore(_abstract(mesh, _state(mesh)))


def test_another_models_checkpoint_is_refused_with_the_arrays_named(tmp_path, mesh):
    state = _state(mesh)
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        checkpoints.save(1, state, wait=True)
        other = _abstract(mesh, state)
        other["params"]["layer"]["kernel"] = jax.ShapeDtypeStruct((64, 65), jnp.float32)
        other["params"]["extra"] = jax.ShapeDtypeStruct((1,), jnp.float32)
        with pytest.raises(
            ValueError,
            match=r"params/extra: not in.*kernel: saved as float32\[64, 64\], this run has "
            r"float32\[64, 65\]",
        ):
            checkpoints.restore(other)
        assert checkpoints.steps() == [1]  # sound, so not set aside


def test_a_run_can_start_from_another_runs_checkpoint(tmp_path, mesh):
    with Checkpoints(tmp_path / "first", OPTIONS) as checkpoints:
        for step in (4, 12):
            checkpoints.save(step, _state(mesh, step), wait=True)
    for path, step in (("first", 12), ("first/checkpoints", 12), ("first/checkpoints/4", 4)):
        with Checkpoints(tmp_path / f"second{step}", OPTIONS) as checkpoints:
            assert (
                checkpoints.restore(_abstract(mesh, _state(mesh)), str(tmp_path / path)).step
                == step
            )
    with Checkpoints(tmp_path / "third", OPTIONS) as checkpoints:
        with pytest.raises(FileNotFoundError, match="no such path"):
            checkpoints.restore(_abstract(mesh, _state(mesh)), str(tmp_path / "nowhere"))
        # once it has its own, a restart goes on from there
        checkpoints.save(1, _state(mesh, 1), wait=True)
        assert checkpoints.restore(_abstract(mesh, _state(mesh)), str(tmp_path / "first")).step == 1


def test_going_back_sets_the_later_steps_aside_once(tmp_path, mesh):
    abstract = _abstract(mesh, _state(mesh))
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _state(mesh, step), wait=True)
        assert checkpoints.restore(abstract, 1).step == 1
        assert checkpoints.steps() == [1, 2, 3]  # only read
        assert checkpoints.restore(abstract, 1, rewind=True).step == 1
        assert checkpoints.steps() == [1] and (tmp_path / "checkpoints/superseded-3").is_dir()
        assert checkpoints.save(2, _state(mesh, 22), wait=True)
        # the same command, restarted
        assert checkpoints.restore(abstract, 1, rewind=True).step == 2
        with pytest.raises(
            FileNotFoundError, match=r"no checkpoint of step 9 .*there are \[1, 2\]"
        ):
            checkpoints.restore(abstract, 9, rewind=True)


def test_a_save_cut_short_is_not_a_checkpoint(tmp_path, mesh):
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        checkpoints.save(1, _state(mesh, 1), wait=True)
    half = next((tmp_path / "checkpoints").glob("1"))
    shutil.copytree(half, tmp_path / "checkpoints/2.orbax-checkpoint-tmp-0")
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        assert checkpoints.restore(_abstract(mesh, _state(mesh))).step == 1
        assert checkpoints.save(2, _state(mesh, 2), wait=True)


def test_a_failing_store_is_tried_again_and_then_the_run_stops(tmp_path, mesh, monkeypatch, caplog):
    real, failures = os.rename, [2]

    def rename(source, target):
        if failures[0] > 0 and "tmp" in str(source):
            failures[0] -= 1
            raise OSError("UNAVAILABLE: try again")
        return real(source, target)

    with Checkpoints(tmp_path, OPTIONS, attempts=3, backoff_seconds=0.0) as checkpoints:
        monkeypatch.setattr("os.rename", rename)
        assert checkpoints.save(1, _state(mesh, 1), wait=True)
        assert failures == [0] and checkpoints.steps() == [1] and "attempt 2 of 3" in caplog.text
        failures[0] = 1
        checkpoints.save(2, _state(mesh, 2))
        while checkpoints._manager.is_saving_in_progress():
            pass
        assert checkpoints.due(3)  # one process makes a failed save good at the next step
        assert checkpoints.save(3, _state(mesh, 3), wait=True) and checkpoints.steps() == [1, 3]
        assert not checkpoints.due(4)
        failures[0] = 99
        with pytest.raises(
            StorageError, match="step 4 could not be saved .* in 3 attempts.*checkpoint: step 3"
        ):
            checkpoints.save(4, _state(mesh, 4), wait=True)
        failures[0] = 0


@pytest.mark.parametrize(
    "module, name, found, said",
    [
        (shutil, "disk_usage", SimpleNamespace(free=3), "no space left .*, and 3 are free"),
        # less than the state's 49,000, which are compressed to more than half
        (files, "most_bytes", 40_000, "and a file may have 40,000 here: ulimit -f"),
    ],
)
def test_a_save_that_there_is_no_room_for_is_not_begun(
    tmp_path, mesh, monkeypatch, module, name, found, said
):
    with Checkpoints(tmp_path, OPTIONS, attempts=2, backoff_seconds=0.0) as checkpoints:
        monkeypatch.setattr(module, name, lambda *_: found)
        monkeypatch.setattr(checkpoints._manager, "save", pytest.fail)
        with pytest.raises(StorageError, match=f"in 2 attempts: .*{said}"):
            checkpoints.save(1, _state(mesh, 1), wait=True)
        with pytest.raises(StorageError, match=said):  # as a run does before its first step
            checkpoints.check_room(_state(mesh, 1))


def test_a_store_that_cannot_be_read_now_is_not_called_corrupt(tmp_path, mesh, monkeypatch):
    with Checkpoints(tmp_path, OPTIONS, attempts=2, backoff_seconds=0.0) as checkpoints:
        checkpoints.save(1, _state(mesh, 1), wait=True)

        def fail(*_, **__):
            raise ValueError("UNAVAILABLE: 503")

        monkeypatch.setattr("orbax.checkpoint.StandardCheckpointHandler.restore", fail)
        with pytest.raises(StorageError, match="could not be read in 2 attempts.*503"):
            checkpoints.restore(_abstract(mesh, _state(mesh)))
        assert checkpoints.steps() == [1]


def test_saving_twice_at_a_step_is_once(tmp_path, mesh):
    with Checkpoints(tmp_path, CheckpointOptions(every_steps=2)) as checkpoints:
        assert [step for step in range(5) if step and checkpoints.due(step)] == [2, 4]
        assert checkpoints.save(2, _state(mesh, 2))
        assert not checkpoints.save(2, _state(mesh, 3), wait=True)
        assert checkpoints.last_good() == 2


def test_checksums_see_any_bit_and_no_sharding():
    mesh = _mesh(fsdp=2, tensor=2)
    tree = {
        "a": jax.random.normal(jax.random.key(0), (4, 6)),
        "b": [jnp.arange(8, dtype=jnp.int8), jnp.bfloat16(3)],
    }
    split = {
        "a": jax.device_put(
            tree["a"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        ),
        "b": tree["b"],
    }
    first = checksums.checksums(tree)
    assert list(first) == ["a", "b/0", "b/1"]
    assert checksums.checksums({"a": split["a"]})["a"] == first["a"]
    bits = np.asarray(tree["a"]).view(np.uint32)
    for place in ((0, 0), (3, 5), (2, 1)):
        for bit in (0, 17, 31):
            changed = bits.copy()
            changed[place] ^= np.uint32(1 << bit)
            assert (
                checksums.checksums({"a": jnp.asarray(changed.view(np.float32))})["a"] != first["a"]
            )
    swapped = tree["a"][::-1]
    assert checksums.checksums({"a": swapped})["a"] != first["a"]


def test_to_keep_no_checkpoint_is_refused():
    config = configs.defaults()
    config.checkpoint.keep = 0
    with pytest.raises(ValueError, match="checkpoint.keep = 0: expected at least 1"):
        configs.read(config)


def test_the_checksums_lie_beside_the_state(tmp_path, mesh):
    with Checkpoints(tmp_path, OPTIONS) as checkpoints:
        checkpoints.save(1, _state(mesh, 1), {"note": "x"}, wait=True)
    record = json.loads((tmp_path / "checkpoints/1/extra/metadata").read_text())
    assert record["extra"] == {"note": "x"} and "params/layer/kernel" in record["checksums"]
