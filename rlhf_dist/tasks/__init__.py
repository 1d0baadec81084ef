"""Tasks that come with the package: data made by code, and reward functions that a file's rows can use."""
