"""One thread: the tests' networks are so small that more would only wait for each other."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def schaefer400_tian3():
    """The real atlas of 450 parcels, where the packages that it is built from are installed."""
    from mnemodyn.data import atlas
    from mnemodyn.data.formats import DataError

    try:
        return atlas.schaefer400_tian3()
    except DataError as error:
        if error.problem != "no-package":
            raise
        pytest.skip(str(error))
