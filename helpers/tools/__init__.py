"""Around the notebooks: running them, keeping each pair equal and fresh, Colab's first cell, the lock file."""
