"""Attention heads: what they know (probes), what they do (influence), whether two jobs share heads (overlap)."""
