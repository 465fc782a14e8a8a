"""Inputs: what a workload is made of: batches and their loaders, weights, functions, and their rules."""
