"""Changes: what operators read and change of buffers and parameters, and the order that it asks for."""
