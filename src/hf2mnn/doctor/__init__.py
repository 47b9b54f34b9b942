"""Static and dynamic checks that explain why a bundle, or a graph of an earlier stage, produces wrong output."""
