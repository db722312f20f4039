"""The HTML report: one file that needs nothing else, made of the JSON files of finished runs and of nothing but these."""
