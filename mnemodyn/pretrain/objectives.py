"""What a network is asked in pretraining: one class for each objective.

An objective makes a view of a window (what is hidden or disturbed), a loss, and validation scores
that mean the same in every run. Views depend on their seed alone. Losses and scores are sums, so that
parts of a batch can be joined.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from mnemodyn.data.scans import DataError
from mnemodyn.model.connectome import to_tangent
from mnemodyn.settings import (
    AutoencodeSettings,
    ConnectomeSettings,
    DenoiseSettings,
    ForecastSettings,
    GroupsSettings,
    LatentSettings,
    MaskedSettings,
    MixedSettings,
    ObjectiveSettings,
)

__all__ = [
    "OBJECTIVES",
    "Autoencode",
    "Connectome",
    "Denoise",
    "Forecast",
    "Groups",
    "Latent",
    "Masked",
    "Mixed",
    "Objective",
    "effective_rank",
    "hide_stretches",
    "make_objective",
]

Batch = Mapping[str, Any]

# Entries of matrices from which the objective connectome fits its closed form.
LARGEST_FIT = 2**25
Sums = dict[str, tuple[Tensor, Tensor]]


class Objective:
    """What objectives share: the network fills a view in, and the squared error is taken over scored entries."""

    name: ClassVar[str]
    metric: ClassVar[str] = "r2_hidden"
    # Further scores: of which sums each is one minus the ratio.
    beside: ClassVar[Mapping[str, tuple[str, str]]] = {
        "r2_visible": ("visible_error", "visible_power")
    }

    # Whether a window comes with what else there is of its person.
    needs_rest: ClassVar[bool] = False
    # Whether the front end fills hidden entries, so that it must be another one for each fold of people.
    fills: ClassVar[bool] = True

    @property
    def monitor(self) -> str:
        """Name of the validation score that chooses the epoch."""
        return f"val_{self.metric}"

    def view(
        self, x: Tensor, *, t_r: float, parcels: Sequence[str], seed: int, training: bool = False
    ) -> dict[str, Tensor]:
        """What is done to one window.

        Parameters
        ----------
        x : Tensor, shape (time, parcel)
            Scaled.
        t_r : float
            Seconds.
        parcels : sequence of str
        seed : int
        training : bool
            In training a view may vary more.

        Returns
        -------
        dict of Tensor, shape (time, parcel)
            All optional: ``hidden`` (bool; not seen, and what the loss counts), ``input`` (seen in
            place of x), and what else an objective reads.
        """
        raise NotImplementedError

    def parts(self, network: nn.Module) -> nn.ModuleDict:
        """Modules trained beside the network; they are left out of its checkpoint."""
        return nn.ModuleDict()

    def prepare(self, network: nn.Module, windows: Any) -> None:
        """What is fitted in closed form to training windows before the first step."""

    def after_step(self, network: nn.Module, parts: nn.ModuleDict) -> None:
        """What follows each step of the optimiser."""

    def loss(self, network: nn.Module, batch: Batch, parts: nn.ModuleDict) -> Sums:
        """The loss in terms, each a (sum, count): it is the sum of the terms' means over the joined batch."""
        output = _run(network, batch, batch.get("input", batch["x"]), batch.get("hidden"))
        scored = _scored(batch)
        error = (_reconstruction(output).float() - batch["x"])[scored].square().sum()
        return {"error": (error, scored.sum()), **_levels(output)}

    def sums(self, network: nn.Module, batch: Batch, parts: nn.ModuleDict) -> dict[str, Tensor]:
        """Sums from which `scores` are formed: float64, added up over batches and processes."""
        x = batch["x"]
        given = batch.get("input", x)
        output = _run(network, batch, given, batch.get("hidden"))
        error = (_reconstruction(output) - x).square().double()
        power = x.square().double()
        scored = _scored(batch)
        visible = _valid(batch) & ~scored
        return {
            "error": error[scored].sum(),
            "power": power[scored].sum(),
            "before": (given - x).square().double()[scored].sum(),
            "visible_error": error[visible].sum(),
            "visible_power": power[visible].sum(),
        }

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Scores by name; that of `metric` chooses the epoch."""
        found = {self.metric: _r2(sums["error"], sums["power"])}
        for name, (error, power) in self.beside.items():
            found[name] = _r2(sums[error], sums[power])
        return found

    def warning(self, scores: Mapping[str, float]) -> str:
        """What is wrong with a run that has these scores; empty where nothing is."""
        return ""


def _run(network: nn.Module, batch: Batch, x: Tensor, hidden: Tensor | None) -> Any:
    """The network's output for x. Only what a batch has is passed on, so that simpler networks do too."""
    known = {name: batch[name] for name in ("censored", "lengths", "folds") if name in batch}
    return network(x, batch["t_r"], hidden=hidden, **known)


def _reconstruction(output: Any) -> Tensor:
    """The reconstruction in a network's output, or the output itself where a network returns no more."""
    return getattr(output, "reconstruction", output)


def _levels(output: Any) -> Sums:
    """The multi-resolution loss as a term, where the network computes it."""
    loss = getattr(output, "multiresolution_loss", None)
    if loss is None:
        return {}
    # A mean over windows, as a sum, so that parts of a batch can be joined.
    n = torch.tensor(len(output.latents), device=output.latents.device)
    return {"multiresolution": (loss * n, n)}


def _valid(batch: Batch) -> Tensor:
    """True at the entries of a batch that were recorded: not padding, not censored."""
    x = batch["x"]
    valid = torch.ones_like(x, dtype=torch.bool)
    if "lengths" in batch:
        frames = torch.arange(x.shape[1], device=x.device)
        valid &= (frames < batch["lengths"][:, None])[..., None]
    if "censored" in batch:
        valid &= ~batch["censored"][..., None]
    return valid


def _scored(batch: Batch) -> Tensor:
    """True at the entries that the loss counts."""
    valid = _valid(batch)
    return valid & batch["hidden"] if "hidden" in batch else valid


def _r2(error: Tensor, power: Tensor) -> float:
    return float(1 - error / power) if power > 0 else 0.0


class Autoencode(AutoencodeSettings, Objective):
    """Return what was shown. A residual stack scores 1 by copying: a high score says nothing."""

    metric = "r2"
    beside: ClassVar = {}

    def view(self, x, *, t_r, parcels, seed, training=False):
        return {}


class Denoise(DenoiseSettings, Objective):
    """Find the clean window in x + sigma N(0, 1).

    Scores: ``r2_clean``, R2 of the clean values, and ``noise_removed``, 1 - error / error of the input as it is: 0 for
    doing nothing.
    """

    metric = "r2_clean"
    beside: ClassVar = {"noise_removed": ("error", "before")}

    def view(self, x, *, t_r, parcels, seed, training=False):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        return {"input": x + self.sigma * noise}


class Masked(MaskedSettings, Objective):
    """Hide stretches of each parcel; the loss is the mean squared error over hidden entries only.

    Scores: R2 of hidden entries, and apart that of visible ones, which nothing asks for.
    """

    def hide(
        self, shape: tuple[int, int, int], seed: int, *, training: bool = False, t_r: float = 1.0
    ) -> Tensor:
        """The mask of one seed: bool, of the shape (batch, time, parcel), True where hidden. `t_r` in seconds."""
        generator = torch.Generator().manual_seed(seed)
        share = self.hidden_share
        if training:
            share += self.share_spread * (2 * torch.rand((), generator=generator).item() - 1)
        window = self.mask_window
        if self.mask_seconds is not None:
            window = max(1, round(self.mask_seconds / t_r))
        return hide_stretches(shape, share=share, window=window, generator=generator)

    def view(self, x, *, t_r, parcels, seed, training=False):
        return {"hidden": self.hide((1, *x.shape), seed, training=training, t_r=t_r)[0]}


def hide_stretches(
    shape: tuple[int, int, int], *, share: float, window: int, generator: torch.Generator
) -> Tensor:
    """Hide stretches of time, in each parcel others.

    In each parcel of each scan ``round(share * time)`` frames are hidden, no more and no fewer: whole
    windows of `window` frames and one shorter one for the rest, in random order and without overlap.
    Two windows may touch, and one may leave the scan at its end and go on at its start: every frame is
    as likely to be hidden as any other.

    `shape` is (batch, time, parcel), and that of the result: bool, True where hidden. ValueError if
    `share` hides no frame or all of them.
    """
    batch, time, parcel = shape
    hidden = round(share * time)
    if not 0 < hidden < time:
        raise ValueError(
            f"share must hide between 1 and {time - 1} of {time} frames, got {share} ({hidden} frames)"
        )
    rows = (batch, parcel)
    n_windows = -(-hidden // window)
    # A row of tokens: the visible frames and the windows. Which tokens are windows is a random draw.
    n_tokens = time - hidden + n_windows
    tokens = torch.rand(*rows, n_tokens, generator=generator).argsort(-1)[..., :n_windows]
    tokens = tokens.sort(-1).values
    # One window, anywhere in the order, has what is left over.
    lengths = torch.full((*rows, n_windows), window)
    lengths[..., 0] = hidden - window * (n_windows - 1)
    order = torch.rand(*rows, n_windows, generator=generator).argsort(-1)
    lengths = lengths.gather(-1, order)
    # Before the i-th window stand (its token - i) visible frames and the windows before it.
    start = tokens - torch.arange(n_windows) + lengths.cumsum(-1) - lengths
    edges = torch.zeros(*rows, time + 1, dtype=torch.int32)
    one = torch.ones_like(start, dtype=torch.int32)
    edges.scatter_add_(-1, start, one)
    edges.scatter_add_(-1, start + lengths, -one)
    mask = edges.cumsum(-1)[..., :time] > 0
    # Few placements reach the first and the last frames. Turned by a random offset, all are hidden
    # equally often.
    offset = torch.randint(time, (*rows, 1), generator=generator)
    mask = mask.gather(-1, (torch.arange(time) + offset) % time)
    return mask.transpose(1, 2).contiguous()


class Forecast(ForecastSettings, Objective):
    """Hide the last seconds of a window in all parcels."""

    def view(self, x, *, t_r, parcels, seed, training=False):
        frames = round(self.horizon / t_r)
        # Two frames must be left: a path needs as many.
        if not 0 < frames < len(x) - 1:
            raise ValueError(
                f"horizon must hide between 1 and {len(x) - 2} frames of a window of {len(x)}, got "
                f"{self.horizon} s, which are {frames} at t_r {t_r} s"
            )
        hidden = torch.zeros(x.shape, dtype=torch.bool)
        hidden[-frames:] = True
        return {"hidden": hidden}


class Groups(GroupsSettings, Objective):
    """Hide one whole group of parcels, for the whole window: neither neighbours in time nor homotopic ones help."""

    def view(self, x, *, t_r, parcels, seed, training=False):
        groups = _groups(self.pattern, tuple(parcels))
        chosen = torch.randint(len(groups), (), generator=torch.Generator().manual_seed(seed))
        hidden = torch.zeros(x.shape, dtype=torch.bool)
        hidden[:, groups[chosen]] = True
        return {"hidden": hidden}


@lru_cache
def _groups(pattern: str, parcels: tuple[str, ...]) -> list[np.ndarray]:
    """Numbers of the parcels whose names agree in the first bracket of the pattern, a list for each group."""
    found = pd.Series(parcels).str.extract(pattern)[0]
    groups = found.groupby(found).indices
    if len(groups) < 2:
        raise ValueError(
            f"pattern {pattern!r} must tell at least two groups of parcels apart by its first "
            f"bracket, found {sorted(groups) or 'none'} in names such as {list(parcels[:3])}"
        )
    return [groups[name] for name in sorted(groups)]


TARGETS = ("earlier", "elsewhere", "both")


class Latent(LatentSettings, Objective):
    """Predict a teacher's embedding of blocks that the student does not see.

    The student sees one block: some parcels in one stretch of time. A predictor, told which entries a
    target block has, goes from the student's latents to the teacher's latents of that block alone:
    ``earlier`` in time (same parcels), ``elsewhere`` (other parcels, same time), and ``both``. No block
    is ever empty. The teacher is the moving average of the student and gets no gradient; its latents are
    normalised frame by frame (layer norm). Against collapse the student's latents of the whole window,
    which are what is used later, are held at unit variance and uncorrelated.

    Scores: ``r2_latent``, R2 of the teacher's normalised embeddings about their mean, and by block; of
    the latents of whole windows ``embedding_sd`` (mean over channels) and ``rank_share`` (effective rank
    over the number of channels).
    """

    metric = "r2_latent"

    def view(self, x, *, t_r, parcels, seed, training=False):
        time, parcel = x.shape
        generator = torch.Generator().manual_seed(seed)
        n_observed = min(time - 1, max(1, round(self.observed_share * time)))
        n_target = min(time - n_observed, max(1, round(self.target_share * time)))
        n_parcels = min(parcel - 1, max(1, round(self.parcel_share * parcel)))
        # The target lies before the observed block, wherever that is.
        latest = time - n_observed
        start = n_target + int(torch.randint(latest - n_target + 1, (), generator=generator))
        before = int(torch.randint(start - n_target + 1, (), generator=generator))
        some = torch.zeros(parcel, dtype=torch.bool)
        some[torch.randperm(parcel, generator=generator)[:n_parcels]] = True
        frames = torch.zeros(time, 1, dtype=torch.bool)
        frames[start : start + n_observed] = True
        earlier = torch.zeros(time, 1, dtype=torch.bool)
        earlier[before : before + n_target] = True
        return {
            "observed": frames & some,
            "earlier": earlier & some,
            "elsewhere": frames & ~some,
            "both": earlier & ~some,
        }

    def parts(self, network):
        k = network.config.n_channels
        p = network.config.n_parcels
        teacher = copy.deepcopy(network).requires_grad_(False)
        predictor = nn.Sequential(nn.Linear(k + p, 2 * k), nn.GELU(), nn.Linear(2 * k, k))
        straight = nn.Linear(k, k, bias=False)
        with torch.no_grad():
            # The first guess is the same latents, half as large: what the blocks share.
            straight.weight.copy_(0.5 * torch.eye(k))
            predictor[-1].weight.mul_(0.1)
        return nn.ModuleDict({"predictor": predictor, "straight": straight, "teacher": teacher})

    @torch.no_grad()
    def after_step(self, network, parts):
        for old, new in zip(parts["teacher"].parameters(), network.parameters(), strict=True):
            old.lerp_(new, 1 - self.teacher_decay)

    def _guesses(self, network, batch, parts):
        """The student's output; the predictor's guesses and the teacher's latents, (target, frame, channel).

        And which frames count, (target, frame).
        """
        output = _run(network, batch, batch["x"], ~batch["observed"])
        blocks = torch.cat([batch[name] for name in TARGETS])
        thrice = {}
        for name in ("x", "t_r", "censored", "lengths"):
            if name in batch:
                thrice[name] = torch.cat([batch[name]] * 3)
        with torch.no_grad():
            targets = _run(parts["teacher"], thrice, thrice["x"], ~blocks).latents.float()
            targets = functional.layer_norm(targets, targets.shape[-1:])
        seen = functional.layer_norm(output.latents, output.latents.shape[-1:]).repeat(3, 1, 1)
        told = torch.cat([seen, blocks.to(seen.dtype)], dim=-1)
        guesses = parts["straight"](seen) + parts["predictor"](told)
        return output, guesses, targets, blocks.any(-1) & _valid(thrice)[..., 0]

    def loss(self, network, batch, parts):
        output, guesses, targets, frames = self._guesses(network, batch, parts)
        # Layers that only the read-out uses take part with a gradient of zero: data-parallel training
        # expects one from every layer.
        idle = 0 * output.reconstruction.float().sum()
        error = functional.mse_loss(guesses.float()[frames], targets[frames], reduction="sum")
        latents = _run(network, batch, batch["x"], None).latents.float()
        guard = self._guard(latents[_valid(batch)[..., 0]])
        return {
            "error": (error + idle, frames.sum() * targets.shape[-1]),
            **_levels(output),
            "guard": (guard, torch.ones_like(guard)),
        }

    def _guard(self, latents: Tensor) -> Tensor:
        """What is added to the loss against collapse, of latents (frame, channel)."""
        moments = _moments(latents)
        if torch.distributed.is_initialized():
            moments = {name: _joined(value) for name, value in moments.items()}
        covariance = _covariance(moments)
        # At zero the root has no finite slope.
        sd = (covariance.diagonal() + 1e-6).sqrt()
        spread = (sd - 1).square().mean()
        correlation = covariance / torch.outer(sd, sd)
        joint = (correlation.square().sum() - correlation.diagonal().square().sum()) / len(sd)
        return self.variance_weight * spread + self.covariance_weight * joint

    def sums(self, network, batch, parts):
        _, guesses, targets, frames = self._guesses(network, batch, parts)
        latents = _run(network, batch, batch["x"], None).latents
        found = _moments(latents[_valid(batch)[..., 0]].double(), "whole_")
        blocks = zip(TARGETS, guesses.chunk(3), targets.chunk(3), frames.chunk(3), strict=True)
        for name, guess, target, where in blocks:
            target = target[where].double()
            found[f"{name}_error"] = (guess[where].double() - target).square().sum()
            found |= _moments(target, f"{name}_")
        return found

    def scores(self, sums):
        parts = {}
        error = 0
        power = 0
        for name in TARGETS:
            n = sums[f"{name}_n"].clamp_min(1)
            own = n * _covariance(sums, f"{name}_").trace()
            parts[f"r2_{name}"] = _r2(sums[f"{name}_error"], own)
            error = error + sums[f"{name}_error"]
            power = power + own
        covariance = _covariance(sums, "whole_")
        return {
            self.metric: _r2(error, power),
            **parts,
            "embedding_sd": float(covariance.diagonal().clamp_min(0).sqrt().mean()),
            "rank_share": effective_rank(covariance) / len(covariance),
        }

    def warning(self, scores):
        if scores["rank_share"] > 0.5 and scores["embedding_sd"] > 0.05:
            return ""
        return "the embeddings collapse: their effective rank is at most half their width, or they hardly vary"


def _moments(z: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """Number, sums and products of embeddings (frame, channel), which can be added up."""
    return {
        f"{prefix}n": z.new_tensor(len(z)),
        f"{prefix}sum": z.sum(0),
        f"{prefix}products": z.T @ z,
    }


def _covariance(moments: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """Covariance of the embeddings whose moments these are."""
    n = moments[f"{prefix}n"].clamp_min(1)
    mean = moments[f"{prefix}sum"] / n
    return moments[f"{prefix}products"] / n - torch.outer(mean, mean)


def _joined(value: Tensor) -> Tensor:
    """The sum over all processes of a value, through which each process gets the gradient of its own part."""
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    # Gradients are averaged over the processes later; the factor makes a sum of that.
    return total + torch.distributed.get_world_size() * (value - value.detach())


def effective_rank(covariance: Tensor) -> float:
    """Exponential of the entropy of the eigenvalues' shares: k for k equal ones. Source: Roy and Vetterli, 2007."""
    values = torch.linalg.eigvalsh(covariance.double()).clamp_min(0)
    if not values.any():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


class Connectome(ConnectomeSettings, Objective):
    """Estimate from a short window what the rest of the person's data show, in tangent space.

    The rest is another session of the person, or else another run, or else the frames outside the window: the first
    that has as many usable frames as the window. No label is used.

    Scores: ``r2_connectome``, R2 about the mean of the training people's connectivity; that of the front end's
    estimate as ``r2_adapted``; and R2 of the estimate by number of frames.
    """

    metric = "r2_connectome"
    needs_rest = True
    fills = False

    def view(self, x, *, t_r, parcels, seed, training=False):
        longest = int(math.log2(max(1, len(x) / self.shortest)))
        generator = torch.Generator().manual_seed(seed)
        doubled = torch.randint(longest + 1, (), generator=generator)
        return {"n_used": torch.clamp(self.shortest * 2**doubled, max=len(x))}

    def prepare(self, network, windows):
        network.connectome.fit(partial(self._pairs, network, windows))
        if not network.connectome.of_latents:
            # Nothing of the loss passes through the blocks.
            network.blocks.requires_grad_(False)
        network.blocks[-1].output.requires_grad_(False)

    def _pairs(self, network: Any, windows: Any, n_frames: int) -> tuple[Tensor, Tensor]:
        """Estimates from training scans of `n_frames`, and what the rest of the people's data show."""
        mean = network.front.lags[0]
        rng = np.random.default_rng(n_frames)
        short = []
        rest = []
        for which in rng.integers(len(windows.scans), size=self._n_scans(mean)):
            frames = np.flatnonzero(~windows.censored[which])
            if len(frames) < n_frames:
                continue
            first = int(rng.integers(len(frames) - n_frames + 1))
            frames = frames[first : first + n_frames]
            try:
                other = windows.rest(which, frames[0], frames[-1] + 1)
            except DataError:  # too little is left of this person
                continue
            rest.append(torch.from_numpy(other).float())
            short.append(torch.from_numpy(windows.scaled(which)[frames]))
        if not rest:
            return mean.new_zeros(0), mean.new_zeros(0)
        adapted = []
        for some in torch.stack(short).split(64):
            adapted.append(network.estimate_connectivity(some, 1.0, "adapted"))
        return torch.cat(adapted), to_tangent(torch.stack(rest), mean)

    def _n_scans(self, mean: Tensor) -> int:
        """Scans of each length: as many as are asked for and fit into memory."""
        return min(self.fit_scans, max(1, LARGEST_FIT // mean.numel()))

    def _estimates(self, network: Any, batch: Batch, kind: str) -> Tensor:
        """What the network makes of the first frames of each window, (batch, parcel, parcel)."""
        x = batch["x"]
        n_used = batch["n_used"]
        if "censored" in batch:
            # The usable frames come first, in their order.
            censored = batch["censored"]
            order = censored.to(torch.uint8).argsort(dim=1, stable=True)
            x = x.gather(1, order[..., None].expand_as(x))
            n_frames = batch.get("lengths", torch.tensor(x.shape[1], device=x.device))
            n_used = n_used.minimum(n_frames - censored.sum(1))
        found = x.new_zeros(len(x), x.shape[2], x.shape[2])
        for n in n_used.unique().tolist():
            rows = n_used == n
            estimate = network.estimate_connectivity(x[rows, :n], batch["t_r"][rows], kind)
            found[rows] = estimate.float()
        return found

    def loss(self, network, batch, parts):
        target = to_tangent(batch["rest"], network.front.lags[0])
        error = (self._estimates(network, batch, "connectome") - target).square().sum()
        # Per parcel: a whole matrix would have an error far from 1.
        return {"error": (error, torch.tensor(target[..., 0].numel(), device=error.device))}

    def sums(self, network, batch, parts):
        target = to_tangent(batch["rest"], network.front.lags[0])
        mean = network.connectome.target
        found = {"power": (target - mean).square().sum().double()}
        for kind in ("connectome", "adapted"):
            error = (self._estimates(network, batch, kind) - target).square().sum((1, 2)).double()
            found[kind] = error.sum()
        return found

    def scores(self, sums):
        power = sums["power"]
        return {
            self.metric: _r2(sums["connectome"], power),
            "r2_adapted": _r2(sums["adapted"], power),
        }


class Mixed(MixedSettings, Objective):
    """Several objectives at once: the weighted sum of their losses on the same windows.

    Scores carry their objective's name; the first one's metric chooses the epoch.
    """

    @cached_property
    def members(self) -> dict[str, tuple[Objective, float]]:
        """Objective and weight by name, in the order of the mix."""
        found = {}
        for one in self.mix:
            given = dict(one)
            name = given.pop("name")
            weight = given.pop("weight")
            found[name] = (OBJECTIVES[name](**given), weight)
        return found

    @property
    def monitor(self) -> str:
        first = next(iter(self.members))
        return f"val_{first}_{self.members[first][0].metric}"

    def _each(
        self, values: Mapping, mark: str = "."
    ) -> Iterator[tuple[str, Objective, float, dict]]:
        """Name, objective and weight of each member, and those of `values` that are its own or everybody's."""
        shared = {key: value for key, value in values.items() if mark not in key}
        for name, (member, weight) in self.members.items():
            start = name + mark
            own = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
            yield name, member, weight, {**shared, **own}

    def view(self, x, **known):
        found = {}
        for name, (member, _) in self.members.items():
            for key, value in member.view(x, **known).items():
                found[f"{name}.{key}"] = value
        return found

    def parts(self, network):
        found = {name: member.parts(network) for name, (member, _) in self.members.items()}
        return nn.ModuleDict(found)

    def after_step(self, network, parts):
        for name, (member, _) in self.members.items():
            member.after_step(network, parts[name])

    def warning(self, scores):
        found = [member.warning(own) for _, member, _, own in self._each(scores, "_")]
        return "; ".join(text for text in found if text)

    def loss(self, network, batch, parts):
        found = {}
        for name, member, weight, own in self._each(batch):
            for key, (total, count) in member.loss(network, own, parts[name]).items():
                found[f"{name}.{key}"] = (weight * total, count)
        return found

    def sums(self, network, batch, parts):
        found = {}
        for name, member, _, own in self._each(batch):
            for key, value in member.sums(network, own, parts[name]).items():
                found[f"{name}.{key}"] = value
        return found

    def scores(self, sums):
        found = {}
        for name, member, _, own in self._each(sums):
            for key, value in member.scores(own).items():
                found[f"{name}_{key}"] = value
        return found


OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (Masked, Denoise, Autoencode, Latent, Forecast, Groups, Connectome, Mixed)
}


def make_objective(settings: ObjectiveSettings) -> Objective:
    """The objective that settings describe, such as those of ``Settings.objective``."""
    values = settings.to_dict()
    return OBJECTIVES[values.pop("name")](**values)
