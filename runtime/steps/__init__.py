"""What a rank does in a step: it carries out instructions, and keeps parameters, state and gradients."""
