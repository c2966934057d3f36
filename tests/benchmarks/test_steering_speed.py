"""Generation under steering folded into biases and under eager hooks, against generation without steering."""

from __future__ import annotations

from contextlib import nullcontext

from benchmarks.measuring import interleaved, keep, ratio
from helpers.data import load_table
from helpers.generation import generate
from helpers.models import load_model
from helpers.prompts import misconceptions, requests
from helpers.steering.iti import fit


def test_generation_under_steering():
    """Strength 0 does all the work of steering and leaves the text, hence the number of tokens, as it is."""
    lm = load_model("data/organism/chat", device="cpu", dtype="float32")
    iti = fit(lm, load_table("facts", "fit")[:100], n_heads=12, n_wrong=1)
    users = [row["question"] for row in misconceptions("val")]
    users += [row["prompt"] for kind in ("harmful", "benign", "look_alike") for row in requests(kind, "val")]
    ways = {"plain": nullcontext, "folded": lambda: iti.folded(lm, 0.0), "hooks": lambda: iti.apply(lm, 0.0)}

    def answers(way):
        with ways[way]():
            return generate(lm, users, max_new_tokens=32)

    expected = answers("plain")
    assert answers("folded") == answers("hooks") == expected
    seconds = interleaved({way: lambda way=way: answers(way) for way in ways}, repeats=21)
    keep("steering", {
        "clock": "CPU time",
        "prompts": len(users), "tokens": sum(one.n_tokens for one in expected), "heads": len(iti.heads),
        "throughput folded into biases / unsteered (target 0.97)": ratio(seconds["plain"], seconds["folded"]),
        "throughput with eager hooks / unsteered": ratio(seconds["plain"], seconds["hooks"]),
    })
