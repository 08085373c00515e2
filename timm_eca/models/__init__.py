"""The registered models, and ECA put into any timm model."""
