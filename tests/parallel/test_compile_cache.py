# SPDX-License-Identifier: Apache-2.0
"""Where compiled programs are kept, and where not."""

import jax
import numpy as np
import pytest

from align_jax.parallel import compile_cache

KEYS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings():
    """JAX's settings as they were, afterwards."""
    kept = {name: getattr(jax.config, name) for name in KEYS}
    yield
    for name, value in kept.items():
        jax.config.update(name, value)
    compile_cache.compilation_cache.reset_cache()


@pytest.mark.parametrize(
    "asked, named, devices, kept",
    [
        ("auto", "", 1, "HOME/align_jax/programs"),
        ("auto", "", 2, ""),  # of several CPU devices none can be
        ("auto", "theirs", 1, "theirs"),  # JAX_COMPILATION_CACHE_DIR
        ("HOME/mine", "theirs", 1, "HOME/mine"),
        ("", "", 1, ""),
    ],
)
def test_where_programs_are_kept(settings, tmp_path, monkeypatch, asked, named, devices, kept):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    jax.config.update("jax_compilation_cache_dir", named or None)
    compile_cache.keep(asked.replace("HOME", str(tmp_path)))
    expected = kept.replace("HOME", str(tmp_path))
    assert (jax.config.jax_compilation_cache_dir or "") == expected


def test_a_folder_that_cannot_be_written_to_is_an_error(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write there; name another"):
        compile_cache.keep(str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.config.update("jax_compilation_cache_dir", None)
    compile_cache.keep()  # nobody has asked for it
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("said, kept", [("", 0.0), ("0.3", 1.0)])
def test_small_programs_are_kept_where_the_environment_names_the_folder(
    settings, monkeypatch, said, kept
):
    monkeypatch.delenv(compile_cache.SMALLEST.upper(), raising=False)
    if said:
        monkeypatch.setenv(compile_cache.SMALLEST.upper(), said)  # JAX has read it: it stays
    jax.config.update("jax_compilation_cache_dir", "theirs")
    jax.config.update(compile_cache.SMALLEST, 1.0)
    compile_cache.keep()
    assert getattr(jax.config, compile_cache.SMALLEST) == kept


@pytest.mark.parametrize("flags, level", [("", 1), ("--xla_backend_optimization_level=0", 0)])
def test_what_runs_once_is_compiled_lightly(monkeypatch, flags, level):
    monkeypatch.setenv("XLA_FLAGS", flags)  # which XLA read when it started
    given, jit = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **options: given.append(options) or jit(f, **options))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    drawn = compile_cache.jit_once(jax.random.normal, out_shardings=place)(jax.random.key(0))
    np.testing.assert_allclose(drawn, jax.random.normal(jax.random.key(0)), rtol=1e-6)
    options = {"xla_backend_optimization_level": level} if level else None
    assert given[0]["compiler_options"] == options
