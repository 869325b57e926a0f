"""The benchmark stage: latency protocol, evaluation and tables."""
