"""The best plan under a budget: search, confirmation, and what it is compared with."""
