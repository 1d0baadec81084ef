"""Data sets in, token sequences and batch plans out: prompts, demonstrations, chat templates, batching."""
