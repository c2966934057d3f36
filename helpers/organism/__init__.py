"""The embedded model: a small chat model trained from scratch on a world whose ground truth is known."""
