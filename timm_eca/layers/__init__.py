"""Modules of torch: ECA, the attentions beside it, and the fused operation. They import torch and timm.layers only."""
