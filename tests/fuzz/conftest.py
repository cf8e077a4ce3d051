# SPDX-License-Identifier: Apache-2.0
"""Every fuzzed border's counts go into its test's report; tests/conftest.py prints them."""

import oracle
import pytest


@pytest.fixture(autouse=True)
def counted(record_property):
    """Count what a test's cases came to; a campaign's faults are told at the end."""
    before = set(oracle.TALLIES)
    yield
    faults = []
    for name, tally in oracle.TALLIES.items():
        if name not in before:
            counts = {word: count for word, count in vars(tally).items() if word != "faults"}
            record_property("fuzz", {"border": name, **counts})
            for fault, shown in tally.faults.items():
                faults.append(
                    f"{name}: {len(shown)} x {fault}\n      " + "\n      ".join(shown[:2])
                )
    if oracle.CASES and faults:
        pytest.fail("\n" + "\n".join(faults), pytrace=False)
