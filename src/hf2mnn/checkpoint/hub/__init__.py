"""Clients of the hubs that serve checkpoints, and pins of their revisions."""
