"""Updates: what changes parameters after a backward pass: optimizers, schedules, masters, averages."""
