"""Files that other software runs: each target writes one, and runs it again to be checked."""
