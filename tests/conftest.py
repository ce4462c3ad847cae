"""Settings for all tests: few threads, and the same random examples in every run."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(min(2, os.cpu_count() or 1))

# Deadlines measure the machine, not the code; derandomize lets a failure be seen again.
settings.register_profile("aclora", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("aclora")
