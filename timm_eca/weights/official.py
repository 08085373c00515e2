"""The checkpoints that the authors published: shapes, links, and the accuracies that the authors report.

Source: the table of https://github.com/BangguWu/ECANet.
"""
from typing import NamedTuple

__all__ = [
    'OFFICIAL', 'OFFICIAL_MODULES', 'PAPER_ID', 'PAPER_NAME', 'PROVENANCES', 'REPOSITORY', 'TAG', 'OfficialCheckpoint',
]

TAG = 'bangguwu_in1k'
OFFICIAL_MODULES = ('eca_resnet', 'eca_mobilenetv2')  # with the models that the authors' code can make
REPOSITORY = 'https://github.com/BangguWu/ECANet'
PAPER_NAME = 'ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks'
PAPER_ID = 'arXiv:1910.03151'


class OfficialCheckpoint(NamedTuple):
    """One of the authors' files."""
    title: str  # the authors' name of the model
    file: str
    drive_id: str  # Google Drive
    kernel_sizes: tuple[int, ...]  # by stage
    top1: float  # ImageNet-1k validation accuracy in percent, reported by the authors in their repository
    top5: float

    @property
    def url(self) -> str:
        return f'https://drive.google.com/file/d/{self.drive_id}/view'


OFFICIAL: dict[str, OfficialCheckpoint] = {
    'eca_resnet18': OfficialCheckpoint(
        'ECA-Net18', 'eca_resnet18_k3577.pth.tar', '1LMRFRTyzVifGBi2MUpTuYEWW44S8mwyl',
        (3, 5, 7, 7), 70.92, 89.93),
    'eca_resnet34': OfficialCheckpoint(
        'ECA-Net34', 'eca_resnet34_k3357.pth.tar', '15LV5Jkea3GPzvLP5__H7Gg88oNQUxBDE',
        (3, 3, 5, 7), 74.21, 91.83),
    'eca_resnet50': OfficialCheckpoint(
        'ECA-Net50', 'eca_resnet50_k3557.pth.tar', '1670rce333c_lyMWFzBlNZoVUvtxbCF_U',
        (3, 5, 5, 7), 77.42, 93.62),
    'eca_resnet101': OfficialCheckpoint(
        'ECA-Net101', 'eca_resnet101_k3357.pth.tar', '1b5FQ8yDFnZ_UhvWT9txmjI_LjbKkgnvC',
        (3, 3, 5, 7), 78.65, 94.34),
    'eca_resnet152': OfficialCheckpoint(
        'ECA-Net152', 'eca_resnet152_k3357.pth.tar', '1_bYnaOg9ptsILC_iC7uQ5Izv-u2rjYG5',
        (3, 3, 5, 7), 78.92, 94.55),
    'eca_mobilenetv2': OfficialCheckpoint(
        'ECA-MobileNetV2', 'eca_mobilenetv2_k13.pth.tar', '1FxzeXPg1SJQZzVVH4HRjMeq_SVMfidUm',
        (1, 1, 1, 1, 3, 3, 3), 72.56, 90.81),
}

# Why a file counts as the authors', in the words of cards and of `timm-eca verify`, by the `provenance` of weights.
PROVENANCES = {
    'downloaded': '`timm_eca` downloaded it from their address',
    'best_prec1': 'it has the shapes of their model and records the top-1 accuracy that they report (`best_prec1`)',
    'vouched': 'the person who converted it says so (`--official`); `timm_eca` could not check that',
}
