"""How far the claims reach: what hangs on a choice, what speaks against them, where every method stands → notebook 07.

Reads committed results, runs no model, chooses nothing, and changes no headline number.
"""
