"""A model under a static plan."""
