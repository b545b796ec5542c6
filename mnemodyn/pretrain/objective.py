"""What a network is asked in pretraining: one class an objective, chosen by name.

An objective makes a view of a window (what is hidden or disturbed), a loss, and validation scores that mean the same
in every run. Views depend on their seed alone; losses and scores are sums, so that parts of a batch can be joined.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from mnemodyn.model.network import MnemoDyn, Output
from mnemodyn.parameters import build, check_settings, unknown
from mnemodyn.pretrain.masking import hide_stretches

__all__ = [
    "OBJECTIVES",
    "Autoencode",
    "Denoise",
    "Forecast",
    "Groups",
    "Latent",
    "Masked",
    "Mixed",
    "Objective",
]
__all__ += ["describe_objective", "effective_rank", "make_objective"]

Sums = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """What objectives share: the network fills a view in, and the squared error is taken over `scored` entries.

    Attributes
    ----------
    multiresolution_weight : float
        Weight of the multi-resolution loss, where the network computes it.
    """

    multiresolution_weight: float = field(default=1.0, kw_only=True)
    name: ClassVar[str]
    metric: ClassVar[str] = "r2_hidden"
    beside: ClassVar[Mapping[str, tuple[str, str]]] = {
        "r2_visible": ("visible_error", "visible_power")
    }

    def __post_init__(self):
        check_settings(self)

    @property
    def monitor(self) -> str:
        """The validation score that chooses the checkpoint."""
        return f"val_{self.metric}"

    def view(
        self, x: Tensor, *, t_r: float, parcels: Sequence[str], seed: int, training: bool = False
    ) -> dict:
        """What is done to one window x (time, parcel), scaled, `t_r` in seconds; in training a view may vary more.

        Tensors of the shape of x, all optional: ``hidden`` (bool; not seen, and what the loss counts), ``input`` (seen
        in place of x), and what else an objective reads.
        """
        raise NotImplementedError

    def parts(self, network: MnemoDyn) -> nn.ModuleDict:
        """Modules trained beside the network; they are left out of its checkpoint."""
        return nn.ModuleDict()

    def after_step(self, network: MnemoDyn, parts: nn.ModuleDict) -> None:
        """What follows each step of the optimiser."""

    def loss(self, network: MnemoDyn, batch: Mapping[str, Tensor], parts: nn.ModuleDict) -> Sums:
        """The loss in terms, each a (sum, count); it is the sum of the terms' means over the joined batch."""
        output, scored = (
            _run(network, batch, batch.get("input", batch["x"]), batch.get("hidden")),
            _scored(batch),
        )
        terms = {
            "error": (
                (output.reconstruction.float() - batch["x"])[scored].square().sum(),
                scored.sum(),
            )
        }
        return terms | self._levels(output)

    def _levels(self, output: Output) -> Sums:
        """The multi-resolution loss as a term, where there is one."""
        if output.multiresolution_loss is None:
            return {}
        n = torch.tensor(len(output.latents), device=output.latents.device)
        return {
            "multiresolution": (self.multiresolution_weight * output.multiresolution_loss * n, n)
        }

    def sums(
        self, network: MnemoDyn, batch: Mapping[str, Tensor], parts: nn.ModuleDict
    ) -> dict[str, Tensor]:
        """Sums from which `scores` are formed: float64, added up over batches and processes."""
        x, scored = batch["x"], _scored(batch)
        given, other = batch.get("input", x), _valid(batch) & ~scored
        error = (
            (_run(network, batch, given, batch.get("hidden")).reconstruction - x).square().double()
        )
        power, before = x.square().double(), (given - x).square().double()
        found = {"error": error[scored], "power": power[scored], "before": before[scored]}
        found |= {"visible_error": error[other], "visible_power": power[other]}
        return {name: values.sum() for name, values in found.items()}

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Scores by name; that of `metric` chooses the checkpoint."""
        ratios = {self.metric: ("error", "power"), **self.beside}
        return {name: _r2(sums[error], sums[power]) for name, (error, power) in ratios.items()}

    def warning(self, scores: Mapping[str, float]) -> str:
        """What is wrong with a run whose scores are these; empty where nothing is."""
        return ""

    def to_dict(self) -> dict:
        return {"name": self.name, **asdict(self)}


def _run(network, batch: Mapping[str, Tensor], x: Tensor, hidden: Tensor | None) -> Output:
    return network(
        x,
        batch["t_r"],
        hidden=hidden,
        **{k: batch[k] for k in ("censored", "lengths") if k in batch},
    )


def _valid(batch: Mapping[str, Tensor]) -> Tensor:
    """True at the entries of a batch that were recorded: not padding, not censored."""
    x, valid = batch["x"], torch.ones_like(batch["x"], dtype=torch.bool)
    if "lengths" in batch:
        valid &= (torch.arange(x.shape[1], device=x.device) < batch["lengths"][:, None])[..., None]
    if "censored" in batch:
        valid &= ~batch["censored"][..., None]
    return valid


def _scored(batch: Mapping[str, Tensor]) -> Tensor:
    return _valid(batch) & batch["hidden"] if "hidden" in batch else _valid(batch)


def _r2(error: Tensor, power: Tensor) -> float:
    return float(1 - error / power) if power > 0 else 0.0


@dataclass(frozen=True)
class Autoencode(Objective):
    """Return what was shown. A residual stack scores 1 by copying: a high score says nothing."""

    name: ClassVar[str] = "autoencode"
    metric: ClassVar[str] = "r2"
    beside: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def view(self, x, *, t_r, parcels, seed, training=False):
        return {}


@dataclass(frozen=True)
class Denoise(Objective):
    """Find the clean window in x + sigma N(0, 1).

    Scores: ``r2_clean``, R2 of the clean values, and ``noise_removed``, 1 - error / error of the input as it is: 0 for
    doing nothing.

    Attributes
    ----------
    sigma : float
        Noise in standard deviations of a scaled parcel.
    """

    sigma: float = 0.1
    name: ClassVar[str] = "denoise"
    metric: ClassVar[str] = "r2_clean"
    beside: ClassVar[Mapping[str, tuple[str, str]]] = {"noise_removed": ("error", "before")}

    def __post_init__(self):
        super().__post_init__()
        if self.sigma <= 0:
            raise ValueError(f"sigma must be > 0, got {self.sigma}")

    def view(self, x, *, t_r, parcels, seed, training=False):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        return {"input": x + self.sigma * noise}


@dataclass(frozen=True)
class Masked(Objective):
    """Hide stretches of each parcel; the loss is the mean squared error over hidden entries only.

    Scores: R2 of hidden entries, and apart that of visible ones, which nothing asks for.

    Attributes
    ----------
    hidden_share : float
        Share of each parcel's frames that is hidden, between 0 and 1.
    mask_window : int
        Length of a hidden window in frames.
    share_spread : float
        In training the share of each window is drawn evenly from ``hidden_share - share_spread`` to
        ``hidden_share + share_spread``, so that the network learns to use what it is given. Validation and
        evaluation hide `hidden_share`.
    mask_seconds : float
        Length of a hidden window in seconds, in place of `mask_window` where it is not 0.
    """

    hidden_share: float = 0.55
    mask_window: int = 15
    share_spread: float = 0.0
    mask_seconds: float = 0.0
    name: ClassVar[str] = "masked"

    def __post_init__(self):
        super().__post_init__()
        if (
            not 0
            < self.hidden_share - self.share_spread
            <= self.hidden_share + self.share_spread
            < 1
        ):
            raise ValueError(
                "hidden_share must lie between 0 and 1, share_spread (>= 0) included; got "
                f"{self.hidden_share} and {self.share_spread}"
            )

    def hide(
        self, shape: tuple[int, int, int], seed: int, *, training: bool = False, t_r: float = 1.0
    ) -> Tensor:
        """The mask of one seed: bool, shape (batch, time, parcel), True where hidden. `t_r` in seconds."""
        share, generator = self.hidden_share, torch.Generator().manual_seed(seed)
        if training:
            share += self.share_spread * (2 * torch.rand((), generator=generator).item() - 1)
        window = max(1, round(self.mask_seconds / t_r)) if self.mask_seconds else self.mask_window
        return hide_stretches(shape, share=share, window=window, generator=generator)

    def view(self, x, *, t_r, parcels, seed, training=False):
        return {"hidden": self.hide((1, *x.shape), seed, training=training, t_r=t_r)[0]}


@dataclass(frozen=True)
class Forecast(Objective):
    """Hide the last seconds of a window in all parcels.

    Attributes
    ----------
    horizon : float
        Seconds that are hidden.
    """

    horizon: float = 10.0
    name: ClassVar[str] = "forecast"

    def view(self, x, *, t_r, parcels, seed, training=False):
        frames = round(self.horizon / t_r)
        if not 0 < frames < len(x) - 1:
            raise ValueError(
                f"horizon must hide between 1 and {len(x) - 2} frames of a window of {len(x)}, got {self.horizon} s, "
                f"which are {frames} at t_r {t_r} s"
            )
        hidden = torch.zeros(x.shape, dtype=torch.bool)
        hidden[-frames:] = True
        return {"hidden": hidden}


@lru_cache
def _members(pattern: str, parcels: tuple[str, ...]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for i, parcel in enumerate(parcels):
        if found := re.search(pattern, parcel):
            groups.setdefault(found[1], []).append(i)
    if len(groups) < 2:
        raise ValueError(
            f"pattern {pattern!r} must tell at least two groups of parcels apart by its first bracket, found "
            f"{sorted(groups) or 'none'} in names such as {list(parcels[:3])}"
        )
    return [groups[name] for name in sorted(groups)]


@dataclass(frozen=True)
class Groups(Objective):
    """Hide one whole group of parcels, for the whole window: neither neighbours in time nor homotopic ones help.

    Attributes
    ----------
    pattern : str
        Regular expression. Parcels whose names agree in its first bracket are a group. The default parts the
        hemispheres; ``"(Vis|SomMot|DorsAttn|SalVentAttn|Limbic|Cont|Default)"`` the networks of Schaefer's atlas.
    """

    pattern: str = r"(?:^|_)([LR])H?(?:_|$)"
    name: ClassVar[str] = "groups"

    def view(self, x, *, t_r, parcels, seed, training=False):
        members, hidden = (
            _members(self.pattern, tuple(parcels)),
            torch.zeros(x.shape, dtype=torch.bool),
        )
        hidden[
            :,
            members[torch.randint(len(members), (), generator=torch.Generator().manual_seed(seed))],
        ] = True
        return {"hidden": hidden}


TARGETS = ("earlier", "elsewhere", "both")


@dataclass(frozen=True)
class Latent(Objective):
    """Predict a teacher's embedding of blocks that the student does not see.

    The student sees one block: some parcels in one stretch of time. A predictor, told which entries a target block
    has, goes from the student's latents to the teacher's latents of that block alone: ``earlier`` in time (same
    parcels), ``elsewhere`` (other parcels, same time), and ``both``. No block is ever empty. The teacher is the moving
    average of the student and gets no gradient; its latents are normalised frame by frame (layer norm). Against
    collapse the student's latents of the whole window, which are what is used later, are held at unit variance and
    uncorrelated.

    Scores: ``r2_latent``, R2 of the teacher's normalised embeddings about their mean, and by block; of the latents of
    whole windows ``embedding_sd`` (mean over channels) and ``rank_share`` (effective rank over the number of channels).

    Attributes
    ----------
    observed_share, target_share : float
        Frames of the observed block and of an earlier one, as a share of the window.
    parcel_share : float
        Parcels of the observed block.
    teacher_decay : float
        Of the teacher's average.
    variance_weight, covariance_weight : float
        Weights of the guard against collapse: the mean over channels of (SD - 1)**2, and of the squared correlations
        with all other channels. After VICReg, Bardes et al., ICLR 2022.
    """

    observed_share: float = 0.5
    target_share: float = 0.25
    parcel_share: float = 0.5
    teacher_decay: float = 0.99
    variance_weight: float = 0.2
    covariance_weight: float = 0.04
    name: ClassVar[str] = "latent"
    metric: ClassVar[str] = "r2_latent"

    def __post_init__(self):
        super().__post_init__()
        shares = (self.observed_share, self.target_share, self.parcel_share)
        if min(shares) <= 0 or max(shares) >= 1 or self.observed_share + self.target_share > 1:
            raise ValueError(
                "observed_share, target_share and parcel_share must lie between 0 and 1, the first two together be at "
                f"most 1; got {shares}"
            )
        if not 0 <= self.teacher_decay < 1:
            raise ValueError(f"teacher_decay must be >= 0 and < 1, got {self.teacher_decay}")

    def view(self, x, *, t_r, parcels, seed, training=False):
        time, parcel = x.shape
        if min(time, parcel) < 2:
            raise ValueError(
                f"a window must have 2 frames and 2 parcels or more for blocks, got {(time, parcel)}"
            )
        generator = torch.Generator().manual_seed(seed)
        observed = min(time - 1, max(1, round(self.observed_share * time)))
        target = min(time - observed, max(1, round(self.target_share * time)))
        start = target + int(torch.randint(time - observed - target + 1, (), generator=generator))
        before = int(torch.randint(start - target + 1, (), generator=generator))
        chosen, some = (
            min(parcel - 1, max(1, round(self.parcel_share * parcel))),
            torch.zeros(parcel, dtype=torch.bool),
        )
        some[torch.randperm(parcel, generator=generator)[:chosen]] = True
        frames, earlier = torch.zeros(2, time, 1, dtype=torch.bool)
        frames[start : start + observed], earlier[before : before + target] = True, True
        blocks = {"observed": frames & some}
        return blocks | dict(
            zip(TARGETS, (earlier & some, frames & ~some, earlier & ~some), strict=True)
        )

    def parts(self, network):
        k, p = network.config.n_channels, network.config.n_parcels
        teacher = copy.deepcopy(network).requires_grad_(False)
        predictor = nn.Sequential(nn.Linear(k + p, 2 * k), nn.GELU(), nn.Linear(2 * k, k))
        straight = nn.Linear(k, k, bias=False)
        with (
            torch.no_grad()
        ):  # the same latents, half as large: what is shared between blocks is a first guess
            straight.weight.copy_(0.5 * torch.eye(k))
            predictor[-1].weight.mul_(0.1)
        return nn.ModuleDict({"predictor": predictor, "straight": straight, "teacher": teacher})

    @torch.no_grad()
    def after_step(self, network, parts):
        for old, new in zip(parts["teacher"].parameters(), network.parameters(), strict=True):
            old.lerp_(new, 1 - self.teacher_decay)

    def _guesses(self, network, batch, parts):
        """The student's output, what the predictor makes of it and what the teacher says, (target, frame, channel)."""
        output = _run(network, batch, batch["x"], ~batch["observed"])
        blocks = torch.cat([batch[name] for name in TARGETS])
        many = {
            k: torch.cat([batch[k]] * 3) for k in ("x", "t_r", "censored", "lengths") if k in batch
        }
        with torch.no_grad():
            targets = _run(parts["teacher"], many, many["x"], ~blocks).latents.float()
            targets = functional.layer_norm(targets, targets.shape[-1:])
        seen = functional.layer_norm(output.latents, output.latents.shape[-1:]).repeat(3, 1, 1)
        guesses = parts["straight"](seen) + parts["predictor"](
            torch.cat([seen, blocks.to(seen.dtype)], dim=-1)
        )
        return output, guesses, targets, blocks.any(-1) & _valid(many)[..., 0]

    def loss(self, network, batch, parts):
        output, guesses, targets, frames = self._guesses(network, batch, parts)
        # Layers that only the read-out uses take part with a gradient of zero: data-parallel training wants all.
        idle = 0 * output.reconstruction.float().sum()
        error = (
            functional.mse_loss(guesses.float()[frames], targets[frames], reduction="sum") + idle
        )
        terms = {"error": (error, frames.sum() * targets.shape[-1])} | self._levels(output)
        seen = _run(network, batch, batch["x"], None).latents.float()[_valid(batch)[..., 0]]
        moments = _moments(seen)
        if (
            torch.distributed.is_initialized()
        ):  # of the joined batch, whatever part of it this process has
            joined = moments.detach().clone()
            torch.distributed.all_reduce(joined)
            # Each process sends back its own part; their gradients are averaged later, which the factor makes a sum.
            moments = joined + torch.distributed.get_world_size() * (moments - moments.detach())
        _, covariance = _covariance(moments)
        sd = (covariance.diagonal() + 1e-6).sqrt()
        spread = (sd - 1).square().mean()
        correlation = covariance / torch.outer(sd, sd)
        joint = (correlation.square().sum() - correlation.diagonal().square().sum()) / len(sd)
        guard = self.variance_weight * spread + self.covariance_weight * joint
        return terms | {"guard": (guard, torch.ones_like(guard))}

    def sums(self, network, batch, parts):
        _, guesses, targets, frames = self._guesses(network, batch, parts)
        whole = _run(network, batch, batch["x"], None).latents
        found = {"moments": _moments(whole[_valid(batch)[..., 0]].double())}
        for name, guess, target, where in zip(
            TARGETS, *(a.chunk(3) for a in (guesses, targets, frames)), strict=True
        ):
            guess, target = guess[where].double(), target[where].double()
            found |= {
                f"{name}_error": (guess - target).square().sum(),
                f"{name}_moments": _moments(target),
            }
        return found

    def scores(self, sums):
        parts = {}
        for name in TARGETS:
            n, covariance = _covariance(sums[f"{name}_moments"])
            parts[f"r2_{name}"] = sums[f"{name}_error"], n * covariance.trace()
        error, power = (sum(column) for column in zip(*parts.values(), strict=True))
        found = {self.metric: _r2(error, power)} | {
            name: _r2(*part) for name, part in parts.items()
        }
        _, covariance = _covariance(sums["moments"])
        found["embedding_sd"] = float(covariance.diagonal().clamp_min(0).sqrt().mean())
        return found | {"rank_share": effective_rank(covariance) / len(covariance)}

    def warning(self, scores):
        if scores["rank_share"] > 0.5 and scores["embedding_sd"] > 0.05:
            return ""
        return "the embeddings collapse: their effective rank is at most half their width, or they hardly vary"


def _moments(z: Tensor) -> Tensor:
    """Number, sums and products of embeddings (frame, channel), as one vector that can be added up."""
    return torch.cat([z.new_full((1,), len(z)), z.sum(0), (z.T @ z).flatten()])


def _covariance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Number and covariance of the embeddings that `_moments` was made from."""
    n, width = (
        moments[0].clamp_min(1),
        round((len(moments) - 0.75) ** 0.5 - 0.5),
    )  # 1 + width + width**2 entries
    mean = moments[1 : 1 + width] / n
    return n, moments[1 + width :].view(width, width) / n - torch.outer(mean, mean)


def effective_rank(covariance: Tensor) -> float:
    """Exponential of the entropy of the eigenvalues' shares: k for k equal ones. Source: Roy and Vetterli, 2007."""
    values = torch.linalg.eigvalsh(covariance.double()).clamp_min(0)
    return float(torch.special.entr(values / values.sum()).sum().exp()) if values.any() else 0.0


@dataclass(frozen=True)
class Mixed(Objective):
    """Several objectives at once: the weighted sum of their losses on the same windows.

    Scores carry their objective's name; the first one's metric chooses the checkpoint.

    Attributes
    ----------
    mix : list of dict
        One an objective: ``name``, ``weight`` (1 by default) and its settings.
    """

    mix: Sequence[Mapping] = ({"name": "masked"}, {"name": "denoise"})
    members: ClassVar[Mapping[str, Objective]] = {}  # set on each instance, from `mix`
    name: ClassVar[str] = "mixed"

    def __post_init__(self):
        given = [dict(one) for one in self.mix]
        if len(given) < 2 or any("name" not in one for one in given):
            raise ValueError(
                f"mix must list two objectives or more, each with a name, got {list(self.mix)}"
            )
        weights = tuple(float(one.pop("weight", 1.0)) for one in given)
        members = tuple(make_objective(one.pop("name"), one) for one in given)
        if len({m.name for m in members} - {self.name}) < len(members) or min(weights) <= 0:
            raise ValueError(
                f"mix must name different objectives with weights > 0, got {list(self.mix)}"
            )
        whole = tuple({**m.to_dict(), "weight": w} for m, w in zip(members, weights, strict=True))
        object.__setattr__(self, "mix", whole)
        object.__setattr__(
            self, "members", dict(zip((m.name for m in members), members, strict=True))
        )

    @property
    def metric(self) -> str:  # type: ignore[override]
        first = next(iter(self.members.values()))
        return f"{first.name}_{first.metric}"

    def _each(self, values: Mapping, mark: str = ".") -> Iterator[tuple]:
        """Name, objective and weight of each member, and those of `values` that are its own or everybody's."""
        for (name, member), one in zip(self.members.items(), self.mix, strict=True):
            own = {
                key.removeprefix(name + mark): v
                for key, v in values.items()
                if key.startswith(name + mark)
            }
            yield (
                name,
                member,
                one["weight"],
                {k: v for k, v in values.items() if mark not in k} | own,
            )

    def view(self, x, **known):
        views = {name: member.view(x, **known) for name, member in self.members.items()}
        return {
            f"{name}.{key}": value for name, view in views.items() for key, value in view.items()
        }

    def parts(self, network):
        return nn.ModuleDict({name: member.parts(network) for name, member in self.members.items()})

    def after_step(self, network, parts):
        for name, member in self.members.items():
            member.after_step(network, parts[name])

    def warning(self, scores):
        return "; ".join(
            filter(None, (member.warning(own) for _, member, _, own in self._each(scores, "_")))
        )

    def loss(self, network, batch, parts):
        found = {}
        for name, member, weight, own in self._each(batch):
            terms = member.loss(network, own, parts[name])
            found |= {
                f"{name}.{key}": (weight * total, count) for key, (total, count) in terms.items()
            }
        return found

    def sums(self, network, batch, parts):
        each = (
            (name, member.sums(network, own, parts[name]))
            for name, member, _, own in self._each(batch)
        )
        return {f"{name}.{key}": value for name, found in each for key, value in found.items()}

    def scores(self, sums):
        each = ((name, member.scores(own)) for name, member, _, own in self._each(sums))
        return {f"{name}_{key}": value for name, found in each for key, value in found.items()}


OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (Masked, Denoise, Autoencode, Latent, Forecast, Groups, Mixed)
}


def make_objective(name: str, settings: Mapping | None = None) -> Objective:
    """An objective by name; ParameterError, with the nearest known one, if that or a setting is unknown."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return build(OBJECTIVES[name], settings or {}, f"{name} setting")


def describe_objective(objective: Objective) -> str:
    """What an objective asks, as the first paragraphs of its documentation say it, and its settings; Markdown."""
    text = (inspect.getdoc(type(objective)) or "").partition("\n\nAttributes")[0].replace("``", "`")
    settings = ", ".join(f"`{k}` {v}" for k, v in objective.to_dict().items() if k != "name")
    return f"**{objective.name}.** {text}\n\nSettings: {settings}."
