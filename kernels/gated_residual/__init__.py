"""A residual that a condition gates."""
