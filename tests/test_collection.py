"""One opener for every source of scans, and what a collection says of them."""

import numpy as np
import pandas as pd
import pytest

from mnemodyn.data import collection
from mnemodyn.data.collection import Collection, open_scans
from mnemodyn.data.scans import DataError, Scan, fingerprint, save_scan
from mnemodyn.data.store import Store, convert

PARCELS = ("a_L", "a_R", "b")
KNOWN = ["participant_id", "session", "run", "site", "family", "mean_fd", "n_frames", "t_r"]


def scan(i, session="1", n_frames=30):
    values = np.random.default_rng([i, int(session)]).standard_normal((n_frames, 3))
    source = f"sub-{i}_ses-{session}_task-rest_timeseries.tsv"
    return Scan(f"sub-{i}", values.astype("f4"), 2.0, PARCELS, source=source, session=session)


SCANS = [scan(1), scan(1, "2"), scan(2), scan(3)]


@pytest.fixture
def folder(tmp_path):
    """Four scans of three people, with a table of these."""
    for each in SCANS:
        save_scan(each, tmp_path / "bids" / each.source)
    people = pd.DataFrame({"participant_id": ["sub-1", "sub-2", "sub-3"], "age": [30, 40, 50]})
    people.to_csv(tmp_path / "bids" / "participants.tsv", sep="\t", index=False)
    return tmp_path / "bids"


def test_every_source_gives_the_same_scans(folder, tmp_path, monkeypatch):
    plain = open_scans(folder)
    cohort = open_scans(folder, cohort="bids")
    stored = open_scans(convert(cohort, tmp_path / "store", dtype="float32").folder)
    monkeypatch.setattr(collection, "IN_MEMORY", 0)
    read_when_asked = open_scans(folder, cohort="bids")
    for found in (plain, cohort, read_when_asked, stored):
        assert isinstance(found, Collection)
        assert set(KNOWN) <= set(found.table)
        assert found.table["participant_id"].tolist() == ["sub-1", "sub-1", "sub-2", "sub-3"]
        assert found.table["n_frames"].tolist() == [30] * 4
        for there, here in zip(found, SCANS, strict=True):
            np.testing.assert_array_equal(there.values, here.values)
            assert (there.t_r, there.parcels) == (2.0, PARCELS)
    assert (plain.name, cohort.name, stored.name) == ("bids", "BIDS", "BIDS")
    assert plain.fingerprint == cohort.fingerprint == read_when_asked.fingerprint
    assert plain.fingerprint == fingerprint(plain)
    assert cohort.table["age"].tolist() == [30, 30, 40, 50]
    assert isinstance(stored, Store)
    assert stored.table["age"].tolist() == [30, 30, 40, 50]
    one = open_scans(folder / SCANS[2].source)
    assert [each.participant_id for each in one] == ["sub-2"]


def test_some_scans_of_a_collection(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "IN_MEMORY", 0)
    lazy = open_scans(folder, cohort="bids")
    for found in (open_scans(folder), lazy, convert(lazy, tmp_path / "store")):
        assert [each.session for each in found.select([3, 1])] == ["1", "2"]
        chosen = found.select(np.array([False, True, True, False]))
        assert [each.participant_id for each in chosen[1:]] == ["sub-2"]
        assert chosen[-1].source == SCANS[2].source
        assert chosen.table["participant_id"].tolist() == ["sub-1", "sub-2"]
        firsts = found.one_per_participant()
        assert [(s.participant_id, s.session) for s in firsts] == [
            ("sub-1", "1"),
            ("sub-2", "1"),
            ("sub-3", "1"),
        ]
        assert firsts.fingerprint != found.fingerprint
        assert len(found) == 4  # as it was
        with pytest.raises(IndexError):
            found[4]


def test_t_r_of_a_cohort_whose_files_state_none(folder):
    for sidecar in folder.glob("*.json"):
        sidecar.unlink()
    with pytest.raises(DataError, match="no scan of cohort bids can be used"):
        open_scans(folder, cohort="bids")
    found = open_scans(folder, cohort="bids", t_r=0.8)
    assert {each.t_r for each in found} == {0.8}
    assert len(open_scans(folder, t_r=0.8, parcels=3)) == 4


def test_simulated_scans_are_marked(folder):
    assert not open_scans(folder).simulated
    (folder / "simulated.json").write_text("{}")
    assert open_scans(folder).simulated
    assert open_scans(folder, cohort="bids").simulated


def test_a_relative_path_is_seen_from_here_or_from_the_root(folder, monkeypatch):
    (folder.parent / "_toc.yml").touch()
    (folder.parent / "notebooks").mkdir()
    for at in (folder.parent, folder.parent / "notebooks"):
        monkeypatch.chdir(at)
        assert len(open_scans("bids")) == 4
