"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

# A busy machine makes examples slow; what they claim does not depend on time.
settings.register_profile(
    "vitcut", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("vitcut")
