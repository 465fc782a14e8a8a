"""Communication: how ranks exchange tensors, what they ask of their machine, and where each says that it is."""
