"""Weights as files: their names, their folders, and where they come from."""
