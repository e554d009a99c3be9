"""Tuning records (facts) and choices (derived from them) per device, shipped and the user's own."""
