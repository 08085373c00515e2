"""Networks as after training, and an image for them."""
import torch
import torch.nn as nn

__all__ = ['image', 'randomize_norms']


def randomize_norms(model: nn.Module) -> nn.Module:
    """Statistics and weights as after training: a fresh network's last norms are zero, and hide what is before them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def image(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
