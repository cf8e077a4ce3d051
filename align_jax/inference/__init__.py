# SPDX-License-Identifier: Apache-2.0
"""Inference: generation, scores of reward models, outside servers."""
