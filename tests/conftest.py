# SPDX-License-Identifier: Apache-2.0
"""Every test runs on eight simulated CPU devices, with dtypes' promotion and warnings checked
strictly; tests of the parts with the shapes and dtypes of every call, but of functions within
functions."""

import functools
import gc
import os
import pathlib
from typing import Any

import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags.of_cpu(8)
os.environ["ALIGN_JAX_TEST_FLAGS"] = os.environ["XLA_FLAGS"]  # for processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Many tests compile the same step again (a resumed run, a second process): the second time it is
# read from disk, if it is of one device.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import compile_cache  # noqa: F401
import jax
import jaxtyping
import pytest


def but_inner(jaxtyped: Any, **given: Any) -> Any:
    """Return jaxtyping's decorator, for all but functions within functions: their checks are made
    anew at each call of the outer one, which took longer than all that was checked."""
    checked = jaxtyped(**given)
    return lambda part: part if "<locals>" in part.__qualname__ else checked(part)


jaxtyping.jaxtyped = functools.partial(but_inner, jaxtyping.jaxtyped)
jaxtyping.install_import_hook("align_jax", "beartype.beartype")
jax.devices()
# Libtpu reads the flags too, when a test compiles for a TPU, and knows fewer of them.
os.environ["XLA_FLAGS"] = xla_flags.known_to_tpu(8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

DATA = pathlib.Path(
    os.environ.get("ALIGN_JAX_TESTDATA") or pathlib.Path(__file__).parents[2] / "shared" / "data"
)
# Where shapes and dtypes are not checked at every call, which took a quarter of the time: tests of
# whole programs (those beside this file too), made of the parts that the others test.
WHOLE = ("tests", "docs", "faults", "fuzz", "launch", "notebook", "runs", "tpu")


def pytest_collection_finish() -> None:
    """Collect garbage as seldom as the programs do: it took an eighth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes and dtypes, or leave them, before a test's first fixture."""
    folder = item.path.parent
    is_whole = folder.name in WHOLE and pathlib.Path(__file__).parent in (folder, folder.parent)
    jaxtyping.config.update("jaxtyping_disable", is_whole)


def pytest_ignore_collect(collection_path: pathlib.Path) -> bool | None:
    """Leave scripts that lie beside the tests (makers of goldens, measurements) out of the
    doctests."""
    script = collection_path.suffix == ".py" and not collection_path.name.startswith(
        ("test_", "conftest")
    )
    return True if script and pathlib.Path(__file__).parent in collection_path.parents else None


@pytest.fixture
def quick_compiles():
    """Leave out LLVM's expensive passes where what the steps of a tiny model take does not matter;
    under JAX 0.10 every test does (tests/xla_flags.py)."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def testdata() -> pathlib.Path:
    """The folder of real data and of a real pretrained model; tests that need it are skipped
    without it."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set ALIGN_JAX_TESTDATA")
    return DATA


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama of bytes with a chat template."""
    from align_jax.data.tokenizer import byte_tokenizer
    from align_jax.interop import hf
    from align_jax.models.model import build

    folder = str(tmp_path_factory.mktemp("tiny_chat"))
    config = hf.config_from(
        dict(
            model_type="llama",
            vocab_size=272,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=1024,
        )
    )
    made = build(config, compute_dtype="float32", remat="none", attention="xla")
    hf.save(folder, config, made.init(jax.random.key(0)))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what came of each fuzzed border's cases (tests/fuzz)."""
    reports = [one for reports in terminalreporter.stats.values() for one in reports]
    ends = [one for one in reports if getattr(one, "when", "") == "teardown"]
    found = [value for one in ends for name, value in one.user_properties if name == "fuzz"]
    if found:
        terminalreporter.section("fuzzed borders")
        words = ("cases", "accepted", "refused", "raw", "wrong", "hangs", "seconds")
        terminalreporter.line(f"{'border':<24}" + "".join(f"{word:>10}" for word in words))
        for row in found:
            row["cases"] = sum(row[word] for word in words[1:-1])
            counts = "".join(f"{round(row[word], 1):>10}" for word in words)
            terminalreporter.line(f"{row['border']:<24}{counts}")
