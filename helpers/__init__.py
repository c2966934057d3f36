"""The companion's rooms: base modules here, one sub-package per notebook, imports pointing one way.

Importing it settles how threads wait and share the cores, before anything imports torch.
"""

from helpers.threads import settle

settle()
