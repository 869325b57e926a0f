"""Models that users bring: adapters name their parts, read their weights, refuse the unknown."""
