"""Generated from proto/recsys/v1: the public API."""
