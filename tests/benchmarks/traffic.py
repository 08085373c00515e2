"""Bytes that a training step reads and writes, relative to the plain timm model. It needs no GPU.

    python tests/benchmarks/traffic.py

On a GPU, norms, activations and attention spend most of their time on reading and writing feature maps. A step (forward
and backward in bfloat16 and channels_last) runs here on tensors without data, on the `meta` device. It makes the same
calls as on a GPU, and each call is counted:

- A call reads its inputs and writes its outputs once. A view costs nothing, a broadcast tensor its bytes in memory.
- Batch norm reads its inputs twice in training: it needs the statistics (in backward: the sums) before the output.
- Our kernels read and write the tensors that they pass to `fused_triton._launch`.

This is a count of bytes and no measurement of time: caches and the speed of kernels are not in it.
"""
import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import timm
import torch
from cost_of_eca import TIMED, make
from measure import table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from timm_eca import set_fused
from timm_eca.layers import eager, fused

__all__ = ['KINDS', 'step_traffic']

KINDS = ('plain', 'timm', 'modules', 'triton')
aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
NORMS = {aten.native_batch_norm.default: (1, 5), aten.native_batch_norm_backward.default: (2, 7)}  # maps, `training`
UNREAD = (aten.copy_.default, aten.fill_.Scalar, aten.zero_.default)  # of the tensor that they write


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in memory. Broadcast dimensions take none."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride()):
        count *= length if stride else 1
    return count * tensor.element_size()


def memory_format(tensor: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format


class Traffic(TorchDispatchMode):
    """Counts the bytes that calls read and write, in convolutions and outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = self.convolutions = 0
        self.launches: Counter[str] = Counter()  # of kernels of ours, by name

    def count(self, reads: Sequence[Any], writes: Sequence[Any]) -> None:
        self.outside += sum(size(tensor) for tensor in (*reads, *writes) if isinstance(tensor, torch.Tensor))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        changed = [
            arg for schema, arg in zip(function._schema.arguments, args)
            if schema.alias_info is not None and schema.alias_info.is_write]
        new = [leaf for leaf in tree_leaves(out)
               if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in storages]
        reads, writes = list(inputs), changed + new
        if not writes or 'empty' in function.__name__:
            return out
        if function in CONVOLUTIONS:
            self.convolutions += sum(map(size, reads + writes))
            # On `meta`, unlike on a GPU, their gradients are contiguous.
            return tree_map_only(torch.Tensor, lambda t: t.contiguous(memory_format=memory_format(t)), out)
        if function in UNREAD:
            reads.remove(changed[0])
        if function in NORMS and args[NORMS[function][1]]:
            reads += inputs[:NORMS[function][0]]
        self.count(reads, writes)
        return out


def step_traffic(kind: str, name: str, batch: int = 8, image_size: int = 224) -> Traffic:
    """Counts a training step without its optimizer. The kinds of models are those of `KINDS`."""
    model = make('timm_eca' if kind in KINDS[2:] else kind, name).to('meta', torch.bfloat16)
    model = model.to(memory_format=torch.channels_last).train()
    x = torch.empty(batch, 3, image_size, image_size, device='meta', dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    traffic = Traffic()

    def launch(kernel: Any, grid: Any, reads: Sequence[Any], writes: Sequence[Any], *args: Any) -> None:
        traffic.launches[kernel.__name__] += 1
        traffic.count(reads, writes)
    with ExitStack() as stack:
        stack.callback(set_fused, True, cuda=False)
        set_fused(kind == 'triton', cuda=kind == 'triton')
        stack.enter_context(patch.object(eager, 'is_watched', lambda: False))
        if kind == 'triton':
            from timm_eca.layers import fused_triton
            stack.enter_context(patch.dict(fused.backends, meta=fused_triton))
            stack.enter_context(patch.object(fused_triton, '_launch', launch))
        with traffic:
            model(x).sum().backward()
    return traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=8)
    args = parser.parse_args()
    print(f'torch {torch.__version__}, timm {timm.__version__}; bfloat16, channels_last, 224 px, batch {args.batch}; '
          'relative to plain, in brackets with convolutions\n')
    rows = []
    for name in TIMED:
        row: dict = {'bytes of a training step': name}
        for kind in KINDS:
            traffic = step_traffic(kind, name, args.batch)
            outside, everything = traffic.outside, traffic.outside + traffic.convolutions
            if kind == 'plain':
                base = outside, everything
                row['plain, MB'] = f'{outside / 1e6:.0f} ({everything / 1e6:.0f})'
            else:
                row[kind] = f'{outside / base[0]:.3f} ({everything / base[1]:.3f})'
        rows.append(row)
    print(table(rows))


if __name__ == '__main__':
    main()
