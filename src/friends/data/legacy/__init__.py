"""Poisons as others publish them: the pickled folder of the public benchmark, and MetaPoison's single file.

Schwarzschild et al., "Just How Toxic is Data Poisoning? A Unified Benchmark for Backdoor and Data Poisoning Attacks",
ICML 2021 (arXiv:2006.12557) defines the folder; the code of FRIENDS, of gradient matching and of Sleeper Agent reads
or writes it:

``poisons.pickle``
    a list of ``(PIL image, label)``; the label of the first is what every goal image is wanted as.
``base_indices.pickle``
    for each poison, the row of the training set whose image it replaces: an array, a list or a tensor.
``target.pickle``
    ``(PIL image, true label)``, or ``(PIL image, true label, patch, [x, y])`` of an image that is yet to be patched.
``source.pickle``
    for backdoors: a list of ``(PIL image that is patched already, true label)``, or one such pair.

Nothing in such a file is run (:mod:`friends.data.unpickle`). Where the programs disagree, and what is done here:

* A patch is pasted as their loaders do it: into the bytes, cut down to whole bytes, not rounded. Files of ours hold
  patches that are whole bytes, so that this cuts nothing off.
* Base indices count the rows of the CIFAR files in their original order. ``order`` maps them to other orders.
* Two setups of the benchmark (78 and 84 of its transfer list) name a base twice. The FRIENDS authors' loader then
  silently keeps the last poison, the benchmark's trains on both, and the exporter of gradient matching leaves one
  poison out but not its index. Here that is an error until ``duplicates`` says which one counts.
* Sleeper Agent writes a single source image, FRIENDS reads a list; both are read here and a list is written.
* The benchmark refuses poisons further than 9/255 from their bases, so it cannot judge xi = 16/255; the files can.
* Images of one channel are of Pillow's mode "L"; the programs above expect "RGB".
"""

from __future__ import annotations

from friends.data.legacy.export import write_folder as write_folder
from friends.data.legacy.folder import read_folder as read_folder
from friends.data.legacy.metapoison import read_metapoison as read_metapoison
from friends.data.legacy.setups import Setup as Setup
from friends.data.legacy.setups import by_class as by_class
from friends.data.legacy.setups import read_setups as read_setups
from friends.data.unpickle import UnsafePickleError as UnsafePickleError
