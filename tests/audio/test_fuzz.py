"""A few hundred mutated files of every format; benchmarks/fuzz_decode.py has as many as one likes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fuzz_decode


def test_mutated_files_are_audio_or_an_error_with_a_reason(tmp_path):
    outcomes, findings = fuzz_decode.fuzz(range(320), tmp_path, processes=1)
    assert findings == {}
    assert sum(outcomes.values()) == 320
    assert {"audio", "unreadable", "truncated", "damaged"} <= set(
        outcomes
    )  # so mutations of all depths were among them
    assert list(tmp_path.iterdir()) == []


def test_a_file_follows_from_its_number():
    assert fuzz_decode.mutated(7) == fuzz_decode.mutated(7)
    assert len({fuzz_decode.mutated(n)[1] for n in range(64)}) == 64
    assert all(data != fuzz_decode.originals()[name] for name, data in map(fuzz_decode.mutated, range(64)))


def misbehave(number: int, folder: Path) -> str:
    if number == 1:
        os.abort()
    if number == 3:
        time.sleep(600)
    if number == 5:
        raise MemoryError("no")
    return "audio"


def test_what_crashes_hangs_or_raises_is_a_finding_and_the_rest_goes_on(tmp_path):
    outcomes, findings = fuzz_decode.fuzz(range(8), tmp_path, processes=1, seconds=2.0, check=misbehave)
    assert outcomes == {"audio": 5}
    assert findings == {1: "the process ended with -6", 3: "the process ended with -9", 5: "FINDING MemoryError: no"}
