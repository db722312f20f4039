"""How parameters and batches are placed on a device mesh."""
