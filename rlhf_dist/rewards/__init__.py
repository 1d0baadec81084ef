"""Rewards: what a person wants, as a number a response. Functions here; reward models are an engine."""
