"""Settings of the whole suite."""

import os

import torch
from hypothesis import HealthCheck, settings

# One thread each: tests run side by side, and the last digits depend on the number of threads.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A busy machine makes examples slow; what they claim does not depend on time.
settings.register_profile(
    "vitcut", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("vitcut")
