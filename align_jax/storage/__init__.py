# SPDX-License-Identifier: Apache-2.0
"""Where a run is kept: checkpoints in two tiers, checksums, the workdir; arrays, no models."""
