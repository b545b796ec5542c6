"""How fast the network is and how much memory it needs. No part of the package; see `python -m benchmarks.speed -h`."""
