# SPDX-License-Identifier: Apache-2.0
"""Online learning: rewards for generated text, and rollouts as a source of batches."""
