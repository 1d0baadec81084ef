"""The Ray actors, each a thin shell over an engine; where they are placed, and how they are called."""
