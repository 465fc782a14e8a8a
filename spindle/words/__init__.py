"""Words: texts and numbers that people give, looked at before they are used or shown."""
