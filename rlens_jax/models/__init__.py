"""The decoder that all families share, and the prompts it reads."""
