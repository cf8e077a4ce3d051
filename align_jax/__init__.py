# SPDX-License-Identifier: Apache-2.0
"""align_jax: language-model alignment from preferences, for TPU pods, in JAX and Flax."""

import os

__version__ = "0.1.0"  # setup.cfg reads it from here

# it would complain that PyTorch is missing: not needed
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
