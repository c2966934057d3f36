"""The companion's rooms: base modules here, one sub-package per notebook, imports pointing one way."""
