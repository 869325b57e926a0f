"""Runtimes that execute a model: each converts it, checks parity, and runs it."""
