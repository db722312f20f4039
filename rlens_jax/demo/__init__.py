"""The embedded model: its files, its training and its measurements."""
