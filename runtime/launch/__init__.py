"""Launchers: what starts the workers of a run, and how one calls them all."""
