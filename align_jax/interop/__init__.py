# SPDX-License-Identifier: Apache-2.0
"""Weights both ways between Hugging Face or PEFT checkpoints and our parameters."""
