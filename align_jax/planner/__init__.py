# SPDX-License-Identifier: Apache-2.0
"""What a run will need on chips that need not be there: memory, collectives, time."""
