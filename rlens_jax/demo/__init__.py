"""The small example that is trained here: pages of handwritten digits, and a tiny model that reads them."""
