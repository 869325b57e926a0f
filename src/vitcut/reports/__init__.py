"""What people read of circuits and results: terminal output, tables and model cards."""
