"""Configuration: the keys of config.yaml, their defaults and checks, and what follows from them."""
