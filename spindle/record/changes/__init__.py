"""Changes: what modules and values hold, and whether code has changed it."""
