"""What a person sees of a run: metrics on disk, progress on the terminal, the report at the end."""
