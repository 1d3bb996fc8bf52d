"""Recipes: small programs on the public pieces, to be used as they are or to be read."""
