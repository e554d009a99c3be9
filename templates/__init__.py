"""Jinja sources, one folder a target, and the plain device headers beside them."""
