"""The rooms behind the notebooks: each notebook has one sub-package, and all share the modules at this level."""
