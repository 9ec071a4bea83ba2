"""Records as they stand in the store."""
