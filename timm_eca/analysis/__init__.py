"""Predictions, accuracies and channel weights of a model, and all figures."""
