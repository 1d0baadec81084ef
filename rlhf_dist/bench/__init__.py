"""Benches: one file a bench, each a command `rlhf-dist bench NAME` that measures the real system."""
