"""See `immutabledict`."""
