"""Why a segmented banded operator is a batched product: that form over a grouped convolution, side by side.

python -m benchmarks.banded
"""

import statistics

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import interleaved
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.operator import BandedOperator


class Grouped(BandedOperator):
    """The same operator as one grouped convolution."""

    def within(self, u: Tensor) -> Tensor:
        s, k2, runs, length = u.shape
        u = u.permute(2, 0, 1, 3).reshape(runs, s * k2, length)
        padding = self.weight.shape[-1] // 2
        u = functional.conv1d(
            u, self.weight.flatten(0, 1), self.bias.flatten(), padding=padding, groups=s
        )
        return u.view(runs, s, k2, length).permute(1, 2, 0, 3)


def main() -> None:
    """Print the ratios of time, product over convolution, forward and backward, at the sizes of each level."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for k, batch in ((300, 2), (300, 8), (128, 8), (48, 8)):
        config = ModelConfig(n_parcels=1, n_timepoints=490, n_channels=k, n_segments=4)
        for n in (245, 123, 62, 31, 16):
            product, grouped = BandedOperator(n, config).to(device), Grouped(n, config).to(device)
            grouped.load_state_dict(product.state_dict())
            u = torch.randn(batch, 2 * k, n, device=device, requires_grad=True)
            steps = {
                "product": lambda product=product, u=u: product(u).sum().backward(),
                "grouped": lambda grouped=grouped, u=u: grouped(u).sum().backward(),
            }
            seconds = {
                name: statistics.median(s) for name, s in interleaved(steps, 9, device).items()
            }
            ratio = seconds["product"] / seconds["grouped"]
            print(
                f"K {k} batch {batch} length {n}: {ratio:.2f} ({seconds['grouped'] * 1e3:.1f} ms grouped)"
            )


if __name__ == "__main__":
    main()
