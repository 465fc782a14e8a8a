"""Cost: seconds of one layer on n devices and bytes it holds there; measured where a profile has it, else predicted."""
