"""Leak: what is planted in one person must not move what is predicted for, or chosen by, anybody else."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd

from mnemodyn.checkpoint import Checkpoint, save_checkpoint
from mnemodyn.data.cohorts import index
from mnemodyn.data.collection import Collection, open_scans
from mnemodyn.data.scaling import METHODS as SCALINGS
from mnemodyn.data.scaling import UNFITTED, Scaling
from mnemodyn.data.scans import DataError, Scan, save_scan
from mnemodyn.evaluate.methods import METHODS, KernelMethod
from mnemodyn.evaluate.study import Task, evaluate
from mnemodyn.pretrain.training import Fronts, pretrain
from mnemodyn.readout import MnemoDynEncoder
from mnemodyn.settings import Settings, TrainingConfig
from mnemodyn.splits import hold_out, inner_splits, repeated_folds
from tests.campaigns.common import PARCELS, Campaign, Trial, scan_of, small_network, values_of

# A fold's products are taken in single precision, from an origin that may be the changed scan.
TOLERANCE = 1e-3
N_PEOPLE = 30
# Rows of a person's scan and cells of the table that a plant changes, by the name of the plant.
PLANTS = ("label", "values", "site", "age", "sex", "mean_fd", "n_frames", "censored", "everything")


# combatlearn is an extra of the installation.
TRIED = [name for name in METHODS if name != "fc_combat" or find_spec("combatlearn")]


class Leak(Campaign):
    name = "leak"
    what = "plants"
    count = 120
    seconds = 120.0

    def prepare(self, folder: Path) -> None:
        network = small_network(front="gaussian", front_lags=1)
        rng = np.random.default_rng(0)
        network.front.fit([values_of(rng) for _ in range(4)])
        self.checkpoint = Checkpoint(network, PARCELS, 2.0, Scaling())
        save_checkpoint(folder / "network", self.checkpoint)
        self.scans, self.table = people(rng)
        # Of every three trials two are evaluations: that is where most ways to leak are.
        evaluations = [self.evaluation] * 8
        self.turns = [*evaluations, self.training, self.fitted, self.copied, self.divided]

    def trial(self, number: int, folder: Path) -> Trial:
        rng = np.random.default_rng([7, number])
        turn = self.turns[number % len(self.turns)]
        if turn == self.evaluation:
            return turn(number, rng, folder)
        return turn(number // len(self.turns), rng, folder)

    def evaluation(self, number: int, rng: np.random.Generator, folder: Path) -> Trial:
        """A test person's labels, scan or confounds, and the others of the same fold."""
        # Every method in turn, with every plant in turn.
        method = TRIED[number % len(TRIED)]
        plant = PLANTS[(number + number // len(self.turns)) % len(PLANTS)]
        target, kind = (("sex", "classification"), ("iq", "regression"))[int(rng.integers(2))]
        task = Task.of(self.table, target, kind)
        folds = repeated_folds(task.table, target, n_folds=2, n_repeats=1, seed=number)
        fold = int(rng.integers(2))
        tested = np.flatnonzero(folds.of(task.people)[0] == fold)
        person = int(rng.choice(tested))
        # A site nobody else has is an error of ComBat, which says so; others must get along.
        new_site = "C" if method == "fc_combat" else "a site that nobody else is at"
        scans, table = planted(self.scans, self.table, person, plant, rng, new_site)
        changed = replace(Task.of(table, target, kind), classes=task.classes)
        if plant == "label" or plant == "everything":
            # The folds stay: they are drawn by labels, and would differ.
            changed = replace(changed, y=other_labels(task, person, tested, rng, plant))
        before, chosen = self.predict(self.scans, task, folds, method)
        after, chosen_now = self.predict(scans, changed, folds, method)
        problems = []
        others = tested if plant == "label" else tested[tested != person]
        scale = np.abs(before[tested]).max() + 1
        moved = np.abs(before[others] - after[others]) / scale
        if not (moved < TOLERANCE).all():
            problems.append(
                f"{method}: {plant} of a test person moves others | by {moved.max():.2g}"
            )
        if chosen[fold] != chosen_now[fold]:
            problems.append(f"{method}: {plant} of a test person changes what is chosen")
        return Trial(f"{plant} in an evaluation", problems)

    def predict(self, scans, task, folds, method) -> tuple[np.ndarray, list[str]]:
        """Predictions, (scan,), and what was chosen in each fold."""
        chosen = []
        original = KernelMethod.fit_predict

        def record(self, split):
            prediction, choice = original(self, split)
            chosen.append(choice)
            return prediction, choice

        with patch.object(KernelMethod, "fit_predict", record):
            done = evaluate(scans, task, folds, [method], checkpoint=self.checkpoint)
        if done.failed:
            raise ValueError(f"{method}: {done.failed[0]['error']}")
        return done.predictions[method][0], chosen

    def training(self, number: int, rng: np.random.Generator, folder: Path) -> Trial:
        """A test or validation person's scan, and the network that is trained."""
        methods = [name for name in SCALINGS if name != "raw"]
        scaling = methods[number % len(methods)]
        side = ("test", "validation")[int(rng.integers(2))]
        settings = Settings.from_mapping(
            {
                "scaling": scaling,
                "model": {"n_timepoints": 16, "n_blocks": 1, "n_channels": 2, "n_levels": 1}
                | {"input_width": 2, "front": "gaussian", "front_lags": 1},
                "training": {"epochs": 2, "windows_per_epoch": 4, "batch_size": 2},
                "machine": {"accelerator": "cpu"},
            }
        )
        scans = [scan_of(rng, f"sub-{i:02d}") for i in range(9)]
        changed = list(scans)
        sides = hold_out([scan.participant_id for scan in scans], n_test=2, n_validation=2)
        person = int(rng.choice(sides[side]))
        changed[person] = replace(scans[person], values=1000 * values_of(rng) - 7)
        found = []
        for name, people_here in (("before", scans), ("after", changed)):
            train = [people_here[i] for i in sides["train"]]
            validation = [people_here[i] for i in sides["validation"]]
            checkpoint, history = pretrain(train, validation, folder / name, settings)
            # What a validation person may decide is which epoch is kept, not how it was trained.
            state = {"scaling": json.dumps(checkpoint.require_scaling().to_dict())}
            state["losses"] = [row["train_loss"] for row in history]
            front = checkpoint.model.front.state_dict()
            state["front end"] = {key: value.tolist() for key, value in front.items()}
            if side == "test":
                state["weights"] = checkpoint.fingerprint()
                state["history"] = history
            found.append(state)
        problems = []
        for name, value in found[0].items():
            if value != found[1][name]:
                problems.append(f"pretrain, {scaling}: a {side} person moves the {name}")
        return Trial(f"{side} person in a training", problems)

    def fitted(self, number: int, rng: np.random.Generator, folder: Path) -> Trial:
        """Scaling, front ends of folds, and read-outs of a batch."""
        which = number % 3
        scans = [scan_of(rng, f"sub-{i:02d}") for i in range(8)]
        person = int(rng.integers(8))
        changed = list(scans)
        changed[person] = replace(scans[person], values=50 * values_of(rng) + 3)
        if which == 0:
            fronts = []
            for group in (scans, changed):
                training = TrainingConfig(cross_fit=4)
                made = Fronts(group, Scaling(), training)
                made.fit(small_network(front="gaussian", front_lags=1).front)
                fronts.append(made)
            fold = fronts[0].folds[person]
            first, second = (made.fronts[fold].state_dict() for made in fronts)
            same = all((first[name] == second[name]).all() for name in first)
            problems = [] if same else ["the front end of a fold has seen a person of that fold"]
            return Trial("person in a front end", problems)
        if which == 1:
            encoder = MnemoDynEncoder(self.checkpoint, ("latent_mean", "latent_sd", "adapted"))
            difference = encoder.transform(scans) - encoder.transform(changed)
            rest = np.delete(difference, person, axis=0)
            problems = ["the read-out of a scan depends on another scan"] if rest.any() else []
            return Trial("person in a batch of read-outs", problems)
        method = str(rng.choice([name for name in SCALINGS if name not in UNFITTED]))
        known = Scaling(method).fit([scan for i, scan in enumerate(scans) if i != person])
        again = known.fit(scans[:1])
        one = known(scans[0])
        before = json.dumps(known.to_dict())
        known(changed[person])
        problems = []
        if json.dumps(known.to_dict()) != before or not np.array_equal(one, known(scans[0])):
            problems.append(f"{method}: scaling a scan changes the scaling")
        if again is known or json.dumps(again.to_dict()) == before:
            problems.append(f"{method}: a scaling fitted to other scans is the same")
        return Trial("person in a scaling", problems)

    def copied(self, number: int, rng: np.random.Generator, folder: Path) -> Trial:
        """One person's series under a second name, in the same or another format."""
        first, second = ("_timeseries.tsv", ".ptseries.nii")
        endings = (first, first if rng.random() < 0.5 else second)
        scans = [scan_of(rng, f"sub-{i:02d}") for i in range(1, 5)]
        twin = replace(scans[int(rng.integers(4))], participant_id="sub-09")
        for scan in [*scans, twin]:
            ending = endings[scan is twin]
            save_scan(scan, folder / "scans" / f"{scan.participant_id}_task-rest{ending}")
        problems = []
        try:
            open_scans(folder / "scans")
            problems.append("a folder with a copy of a person is opened")
        except DataError as error:
            if error.problem != "duplicate-series":
                problems.append(f"a copy of a person is refused as {error.problem}")
        table = "participant_id\tage\n" + "".join(f"sub-{i:02d}\t30\n" for i in (1, 2, 3, 4, 9))
        (folder / "scans" / "participants.tsv").write_text(table)
        if endings[0] == endings[1]:
            found = index("bids", folder / "scans")
            still = set(found.table["participant_id"]) & {"sub-09"}
            if still or len(found) != 3:
                problems.append("an index keeps a copy of a person")
        try:
            settings = Settings.from_mapping({"machine": {"accelerator": "cpu"}})
            pretrain(scans[:2], [twin, scans[0]], folder / "run", settings)
            problems.append("a person is trained and validated on")
        except DataError:
            pass
        return Trial("copy of a person", problems)

    def divided(self, number: int, rng: np.random.Generator, folder: Path) -> Trial:
        """Who is where must follow from identifiers and labels, not from what is in the scans or their order."""
        n = int(rng.integers(12, 60))
        who = np.array([f"sub-{i:03d}" for i in rng.choice(500, n)])
        settings = {"n_test": int(rng.integers(1, 4)), "n_validation": 0.2}
        settings["seed"] = None if rng.random() < 0.5 else number
        order = rng.permutation(n)
        problems = []
        one = hold_out(who, **settings)
        other = hold_out(who[order], **settings)
        for side in one:
            if set(who[one[side]]) != set(who[order][other[side]]):
                problems.append(f"hold_out: the order of scans decides who is in {side}")
        y = rng.standard_normal(n)
        families = np.array([f"f{i}" for i in rng.integers(0, n // 2, n)])
        first = inner_splits(y, families, 3, seed=number)
        second = inner_splits(y * 1e3 + 5, families, 3, seed=number)
        for (fit, rest), (fit_again, rest_again) in zip(first, second, strict=True):
            if not (np.array_equal(fit, fit_again) and np.array_equal(rest, rest_again)):
                problems.append("inner_splits: the unit of the target decides who is where")
        return Trial("division of people", problems)


def people(rng: np.random.Generator) -> tuple[Collection, pd.DataFrame]:
    """Scans of people of three sites with all that a table may know of them."""
    n = N_PEOPLE
    table = pd.DataFrame(
        {
            "participant_id": [f"sub-{i:03d}" for i in range(n)],
            "family": [f"family-{i // 2}" for i in range(n)],
            "site": np.array(["A", "B", "C"])[np.arange(n) % 3],
            "age": rng.uniform(20, 60, n),
            "sex": np.array(["male", "female"])[rng.permutation(n) % 2],
            "mean_fd": rng.uniform(0.05, 0.35, n),
            "n_frames": 40,
            "iq": rng.normal(100, 15, n),
        }
    )
    scans = [scan_of(rng, who) for who in table["participant_id"]]
    return Collection(scans, table), table


def planted(
    scans: Collection,
    table: pd.DataFrame,
    person: int,
    plant: str,
    rng: np.random.Generator,
    new_site: str,
) -> tuple[Collection, pd.DataFrame]:
    """Scans and table with something else in one person's rows."""
    content: list[Scan] = list(scans)
    table = table.copy()
    everything = plant == "everything"
    if plant == "values" or everything:
        content[person] = replace(content[person], values=300 * values_of(rng) - 40)
    if plant == "censored" or everything:
        censored = rng.random(40) < 0.4
        content[person] = replace(content[person], censored=censored)
    if plant == "site" or everything:
        table.loc[person, "site"] = new_site
    for name, value in (("age", 900.0), ("mean_fd", 40.0), ("n_frames", 10**6)):
        if plant == name or everything:
            table.loc[person, name] = value
    if plant == "sex":
        other = {"male": "female", "female": "male"}
        table.loc[person, "sex"] = other[table.loc[person, "sex"]]
    return Collection(content, table), table


def other_labels(
    task: Task, person: int, tested: np.ndarray, rng: np.random.Generator, plant: str
) -> np.ndarray:
    """Labels with other ones for a test person, or for all people who are tested together."""
    y = task.y.copy()
    rows = tested if plant == "label" else [person]
    y[rows] = 1 - y[rows] if task.kind == "classification" else rng.normal(500, 300, len(rows))
    return y
