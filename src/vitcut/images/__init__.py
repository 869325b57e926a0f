"""Images: readers of archives, folders and parquet files, the prepared cache, splits and pairs."""
