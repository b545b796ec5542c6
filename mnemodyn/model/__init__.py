"""The network: wavelets, the control, one operator block, and the stack. Knows nothing of files."""
