"""Generated from proto/recsys/store/v1: what stands in the store."""
