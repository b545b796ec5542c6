r"""From a short scan to its person's connectivity on another day, in tangent space.

In the tangent space at the group's covariance :math:`C(0)` the front end's estimate of a scan is a symmetric matrix
S (Varoquaux et al. 2010, MICCAI). What two scans of one person share lies mostly in few directions of parcels, R, the
eigenvectors of :math:`\sum_i X_i Y_i + Y_i X_i` over deviations X of scans and Y of the rest of their people's data.
In these directions each entry is shrunk by its own weight, which depends on the number of frames n:

.. math:: E = w(n) \circ R^\top (S - \bar S(n)) R, \qquad
          \hat Y = \bar Y + R \Big(E + \mathrm{sym} \sum_k B_k E A_k^\top\Big) R^\top.

Means, R and w are least squares over training scans, in closed form. The matrices A and B are trained; B starts as
zero, so that a fresh network is the closed form. With ``connectome="operator"``, terms
:math:`B_{jk} P_j A_{jk}^\top` are added, where :math:`P_j` are the products of the blocks' latents on scale j of their
wavelet transform, which a covariance does not have.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mnemodyn.model.front import power, to_tangent

__all__ = ["Connectome", "from_tangent", "standardised", "to_matrix", "to_tangent", "to_vector"]

# Frames at which means and weights are fitted, each twice the one before. Between them they are linear in log n.
LENGTHS = (30, 60, 120, 240, 480, 960)
# The weight of an entry is pulled to that of all entries as if by this share of the mean square of an entry.
PULL = 0.5


def standardised(x: Tensor) -> Tensor:
    """Scans (..., time, parcel) with mean 0 and SD 1 of their own; 0 where a parcel is constant."""
    x = x - x.mean(-2, keepdim=True)
    sd = x.square().mean(-2, keepdim=True).sqrt()
    return torch.where(sd > 1e-6, x / sd.clamp_min(1e-6), 0)


def from_tangent(matrix: Tensor, mean: Tensor) -> Tensor:
    """The covariances of which `matrix` is what ``to_tangent`` returns."""
    root = power(mean, 0.5)
    return root @ torch.linalg.matrix_exp(matrix) @ root


def to_vector(matrix: Tensor) -> Tensor:
    """Symmetric matrices as vectors (..., P (P + 1) / 2): the upper triangle times the root of 2, then the diagonal.

    Distances between vectors are those between the matrices.
    """
    n = matrix.shape[-1]
    rows, columns = torch.triu_indices(n, n, 1)
    across = matrix[..., rows, columns] * 2**0.5
    return torch.cat([across, matrix.diagonal(dim1=-2, dim2=-1)], dim=-1)


def to_matrix(vector: Tensor) -> Tensor:
    """The symmetric matrices of which `vector` is what :func:`to_vector` returns."""
    n = int((2 * vector.shape[-1]) ** 0.5)
    rows, columns = torch.triu_indices(n, n, 1)
    matrix = vector.new_zeros(*vector.shape[:-1], n, n)
    matrix[..., rows, columns] = vector[..., :-n] / 2**0.5
    matrix = matrix + matrix.mT
    matrix.diagonal(dim1=-2, dim2=-1).copy_(vector[..., -n:])
    return matrix


class Connectome(nn.Module):
    """Estimate of a person's connectivity from that of a short scan, in tangent space.

    Parameters
    ----------
    n_parcels : int
    n_maps : int
        Pairs of matrices A, B.
    n_channels : int
        Channels of the latents; 0 if they are not used.
    n_scales : int
        Scales of the latents.
    """

    def __init__(self, n_parcels: int, n_maps: int, n_channels: int = 0, n_scales: int = 0):
        super().__init__()
        square = (n_parcels, n_parcels)
        n_lengths = len(LENGTHS)
        self.directions = nn.Buffer(torch.eye(n_parcels))
        self.centres = nn.Buffer(torch.zeros(n_lengths, *square))
        self.weights = nn.Buffer(torch.ones(n_lengths, *square))
        self.target = nn.Buffer(torch.zeros(square))
        self.read = nn.Parameter(torch.randn(n_maps, *square) / 8)
        self.write = nn.Parameter(torch.zeros(n_maps, *square))
        self.of_latents = n_channels > 0
        if self.of_latents:
            shape = (n_scales, n_maps, n_parcels, n_channels)
            self.read_latents = nn.Parameter(torch.randn(shape) / n_channels)
            self.write_latents = nn.Parameter(torch.zeros(shape))

    @torch.no_grad()
    def fit(self, pairs: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Set what is in closed form.

        ``pairs(n)`` returns, for scans of n frames, S and the rest of the same people's data, both (scan, parcel,
        parcel) in tangent space; of no scans where none is so long. ValueError if it never returns any.
        """
        longest = None
        for i in reversed(range(len(LENGTHS))):
            x, y = pairs(LENGTHS[i])
            if not len(x):
                continue
            self.centres[i] = x.mean(0)
            x = x - self.centres[i]
            if longest is None:
                longest = i
                self.target.copy_(y.mean(0))
                shared = (x @ (y - self.target)).sum(0)
                self.directions.copy_(torch.linalg.eigh(shared + shared.mT).eigenvectors)
            self.weights[i] = _weights(self._turned(x), self._turned(y - self.target))
        if longest is None:
            raise ValueError(
                f"no scan has {LENGTHS[0]} frames besides the rest of its person's data"
            )
        # Longer scans than there are in training are treated as the longest.
        self.centres[longest + 1 :] = self.centres[longest]
        self.weights[longest + 1 :] = self.weights[longest]

    def _turned(self, matrix: Tensor) -> Tensor:
        """A matrix of parcels as one of directions."""
        return self.directions.mT @ matrix @ self.directions

    def forward(self, matrix: Tensor, n_frames: int, products: Sequence[Tensor] = ()) -> Tensor:
        """The estimate, (batch, parcel, parcel) in tangent space.

        Parameters
        ----------
        matrix : Tensor, shape (batch, parcel, parcel)
            Estimate of the front end in tangent space, S.
        n_frames : int
            Frames that it is from.
        products : sequence of Tensor, shape (batch, channel, channel)
            Of the latents, a tensor a scale.
        """
        place = min(max(math.log2(n_frames / LENGTHS[0]), 0.0), len(LENGTHS) - 1.0)
        before = min(int(place), len(LENGTHS) - 2)
        share = place - before
        centre = self.centres[before].lerp(self.centres[before + 1], share)
        weights = self.weights[before].lerp(self.weights[before + 1], share)
        shrunk = weights * self._turned(matrix - centre)
        change = _mapped(shrunk, self.read, self.write)
        if self.of_latents:
            maps = zip(products, self.read_latents, self.write_latents, strict=True)
            change = change + sum(_mapped(*one) for one in maps)
        found = shrunk + (change + change.mT) / 2
        return self.directions @ found @ self.directions.mT + self.target


def _weights(x: Tensor, y: Tensor) -> Tensor:
    """Weights of entries, least squares from x to y (scan, entry, entry), pulled to the weight of all entries."""
    products = (x * y).sum(0)
    squares = x.square().sum(0)
    pull = PULL * squares.mean()
    overall = products.sum() / squares.sum()
    return ((products + overall * pull) / (squares + pull)).clamp_min(0)


def _mapped(matrix: Tensor, read: Tensor, write: Tensor) -> Tensor:
    """The sum over k of ``write[k] @ matrix @ read[k].T`` for every matrix (batch, n, n)."""
    return (write @ (matrix[:, None] @ read.mT)).sum(1)
