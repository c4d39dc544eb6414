"""Train image classifiers on data you cannot trust: the Friendly Noise Defense, its attacks and its rivals."""
