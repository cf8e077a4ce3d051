# SPDX-License-Identifier: Apache-2.0
"""Tests compile much and compute little: without LLVM's optimizations, MLIR's fusions and a module
split for many cores a train step compiles in an eighth of the time."""

import importlib.metadata

_FASTER = (
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
# XLA ends a process at a flag that it does not know, and JAX 0.11 has one way to compile fusions.
_OLDER = importlib.metadata.version("jaxlib").startswith("0.10.")


def known_to_tpu(devices: int) -> str:
    """Return the flags that libtpu knows, too."""
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=300"
    )


def of_cpu(devices: int) -> str:
    """Return the flags of so many simulated devices."""
    return f"{known_to_tpu(devices)} {_FASTER}" if _OLDER else known_to_tpu(devices)
