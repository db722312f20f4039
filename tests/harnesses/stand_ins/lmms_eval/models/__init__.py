"""As in lmms-eval."""
