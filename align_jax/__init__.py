# SPDX-License-Identifier: Apache-2.0
"""align_jax: language-model alignment from preferences, for TPU pods, in JAX and Flax."""
