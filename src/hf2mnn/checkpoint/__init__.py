"""Where a model comes from: is it whole, is it one that can be converted."""
