"""Loading: batches from the user's loaders, read once on each machine and given to its ranks."""
