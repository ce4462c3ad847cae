"""Random numbers of the fuzz tests: always the same, unless ACLORA_FUZZ_SEED asks for others (bench/fuzz.py)."""

import os
import random

SEED = int(os.environ.get("ACLORA_FUZZ_SEED", "0"))


def chance(number: int) -> random.Random:
    """Return the generator of one test or of one part of it."""
    return random.Random(number + 1_000_003 * SEED)
