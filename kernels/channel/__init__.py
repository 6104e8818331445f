"""Channel attention."""
