# SPDX-License-Identifier: Apache-2.0
"""Measure a streamed import: generate a sharded checkpoint of a few GB, read it, report the peak of
host memory.

    python tools/measure_import.py [--layers=8] [--width=2048] [--dtype=bfloat16] [--devices=1]

On a CPU the parameters themselves lie in host memory; what is reported is the peak of anonymous
memory beyond them and beyond what the process held before, in units of the largest tensor.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import threading
import time

parser = argparse.ArgumentParser()
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--width", type=int, default=2048)
parser.add_argument("--vocab", type=int, default=128_000)
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--devices", type=int, default=1)


def anonymous() -> int:
    """Return this process's anonymous resident memory, in bytes (mapped files are the kernel's to
    drop)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status: this measurement needs Linux")


def main() -> None:
    """Generate, import, report as one JSON line."""
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.devices}"
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import jax
    import ml_dtypes
    import numpy as np

    from align_jax.interop import hf, tensor_files
    from align_jax.models.model import build
    from align_jax.parallel.mesh import make_mesh
    from align_jax.parallel.sharding import tree_shardings

    config = hf.config_from(
        dict(
            model_type="llama",
            vocab_size=arguments.vocab,
            hidden_size=arguments.width,
            num_hidden_layers=arguments.layers,
            intermediate_size=4 * arguments.width,
            num_attention_heads=16,
            num_key_value_heads=8,
        )
    )
    shapes = hf.tensor_shapes(hf.tensor_maps(config), config)
    mesh = make_mesh({"fsdp": -1})
    shardings = tree_shardings(mesh, build(config).axes())
    with tempfile.TemporaryDirectory() as folder:
        drawn = (
            np.random.default_rng(0)
            .integers(0, 1 << 15, 1 << 20)
            .astype(np.uint16)
            .view(ml_dtypes.bfloat16)
        )
        tensor_files.write(
            folder, shapes, drawn.dtype, lambda name: np.resize(drawn, shapes[name]), 10**9
        )
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config.to_hf()))
        before, peak, running = anonymous(), [0], True

        def watch() -> None:
            while running:
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.time()
        _, params = hf.load(folder, dtype=arguments.dtype, shardings=shardings)
        jax.block_until_ready(params)
        seconds = time.time() - start
        running = False
        watcher.join()
    itemsize = np.dtype(getattr(ml_dtypes, arguments.dtype, arguments.dtype)).itemsize
    held = sum(leaf.size for leaf in jax.tree.leaves(params)) * itemsize
    largest = max(int(np.prod(shape)) for shape in shapes.values()) * itemsize
    beyond = peak[0] - before - held
    print(
        json.dumps(
            {
                "devices": arguments.devices,
                "dtype": arguments.dtype,
                "checkpoint_gb": round(held / 1e9, 2),
                "largest_tensor_gb": round(largest / 1e9, 3),
                "beyond_parameters_gb": round(beyond / 1e9, 3),
                "in_largest_tensors": round(beyond / largest, 2),
                "seconds": round(seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
