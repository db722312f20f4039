"""Model folders: find, load, save and convert them."""
