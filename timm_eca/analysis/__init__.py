"""What a model does with images: predictions and channel weights."""
