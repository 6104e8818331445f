"""Agent attention."""
