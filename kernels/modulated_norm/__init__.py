"""A norm whose result a condition scales and shifts."""
