"""Property tests: enough examples to find what is wrong, few enough to be run at each save."""

from hypothesis import HealthCheck, settings

settings.register_profile("vmherd", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmherd")
