"""Workload specs: YAML files in, checked values, TaskGraphs out."""
