"""Choosing what to cut under a budget: scores from discovery, costs from the compiler."""
