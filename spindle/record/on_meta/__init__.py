"""On meta: what stands for tensors that have no numbers, and what operations give on them."""
