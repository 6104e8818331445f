"""Join attention over parts of the keys into attention over all of them."""
