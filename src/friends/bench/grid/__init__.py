"""Many cells: grids of trials, cached by what they are made of, run by one process or a cluster, and shown."""
