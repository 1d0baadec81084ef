"""What recipes are made of: sections of their settings and the functions that read them."""
