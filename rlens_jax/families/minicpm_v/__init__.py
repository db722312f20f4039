"""MiniCPM-V."""
