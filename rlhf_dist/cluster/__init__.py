"""The Ray actors, where they are placed, and how they are called. Each actor is a thin shell over an engine."""
