"""Imported last by the fork server of `pool`: its children then leave alone, in each garbage collection, what has been
imported. Each training begins with one."""

import gc

gc.collect()
gc.freeze()
