# SPDX-License-Identifier: Apache-2.0
"""From a resolved config to a run ready to step: what the programs share."""
