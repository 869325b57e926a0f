"""Finding circuits: one algorithm a file, none imports another."""
