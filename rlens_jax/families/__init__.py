"""The supported model families: one folder per family, and what several families share."""
