"""One run, many runs, and the pictures of runs."""
