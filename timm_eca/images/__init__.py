"""Image files, class folders and splits, for prediction, evaluation and training."""
