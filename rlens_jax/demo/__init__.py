"""The embedded model and how it was trained."""
