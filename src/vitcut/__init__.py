"""vitcut."""
