"""Imported by the process that servers are forked from, after all else: the garbage collector leaves that alone.

A server collects once before it serves, and would look at everything that was imported, and so copy its pages: a third
of what its start costs. What it makes itself is looked at as ever.
"""

import gc

gc.collect()
gc.freeze()
