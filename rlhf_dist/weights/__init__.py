"""Versioned weight snapshots and the proof that a worker serves one."""
