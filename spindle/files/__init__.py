"""Files: text that comes from outside in, checked values out, and back."""
