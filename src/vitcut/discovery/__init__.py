"""Circuit discovery: one algorithm per file; none imports another."""
