"""The driver: starts the roles, paces the loop, keeps the run folder."""
