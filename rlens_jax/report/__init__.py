"""What a finished ranking run tells: ranking.json, timing.json, plots, a Markdown report, a summary."""
