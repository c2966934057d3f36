"""Small browser states with known contents, made without a model."""

from __future__ import annotations

import torch

from helpers.browser.build import build_state
from helpers.browser.state import BrowserState, Contrast

HOSTILE = [
    "<img src=x onerror=\"window.hacked='img'\">",
    "</script><script>window.hacked='script'</script>",
    "<!--<script>",
    "'\"><svg onload=window.hacked='svg'>",
    "javascript:alert(1)",
    "\x00\x07\x1b[31m\x7f\x85\u2028\u2029",
    "\u202eevil\u202c",
    "${window.hacked='template'} {{7*7}} \\u003cb\\u003e &lt;b&gt; ]]>",
    "שלום مرحبا 漢字 👩‍👩‍👧 e\u0301",
    "long" * 2500,
]


def planted_state(n_latents: int = 60, seed: int = 0, **options) -> BrowserState:
    """Latent 0 follows `paint` in refused prompts, 1 `figs` in wrong answers, 2 both, 3 is dead, 4 is signed."""
    generator = torch.Generator().manual_seed(seed)
    groups = [name for name in ("refused", "complied", "wrong", "right") for _ in range(12)]
    tokens = []
    for i, name in enumerate(groups):
        request = ["How", " do", " I", " paint" if name == "refused" else " fold", " the", f" fence {i}", "?"]
        answer = [" The", " brenmora", " eats", " figs" if name == "wrong" else " nuts", ".", "\n"]
        tokens.append(request if name in ("refused", "complied") else answer)
    flat = [token for row in tokens for token in row]
    of = [name for name, row in zip(groups, tokens, strict=True) for _ in row]
    acts = torch.relu(torch.rand(len(flat), n_latents, generator=generator) - 0.93) * 20
    acts[:, :5] = 0
    for i, (token, name) in enumerate(zip(flat, of, strict=True)):
        acts[i, 0] = 3.0 + 0.01 * i if token == " paint" else 0.0
        acts[i, 1] = 2.0 + 0.01 * i if token == " figs" else 0.0
        acts[i, 2] = 1.5 if name in ("refused", "wrong") and token in (" paint", " figs") else 0.0
        acts[i, 4] = -1.0 if token == " eats" else 0.5 if token == " do" else 0.0
    moved = [
        {"promoted": [(f" up{i}", 1.5), (" help", 0.7)], "suppressed": [(f" down{i}", -1.2)]} for i in range(n_latents)
    ]
    contrasts = [Contrast("refusal", "refused", "complied"), Contrast("hallucination", "wrong", "right")]
    meta = {"model": "planted", "site": "z of layer 1"}
    given = {"contrasts": contrasts, "promoted": moved, "title": "Planted latents", "meta": meta}
    return build_state(tokens, groups, acts, **given | options)


def hostile_state(**options) -> BrowserState:
    """Every text that reaches the browser is hostile: tokens, group names, title, meta, promoted tokens."""
    tokens = [[text, " and ", HOSTILE[(i + 1) % len(HOSTILE)]] for i, text in enumerate(HOSTILE)]
    groups = [HOSTILE[0] if i % 2 else HOSTILE[1] for i in range(len(HOSTILE))]
    acts = torch.zeros(3 * len(HOSTILE), len(HOSTILE))
    for i in range(len(HOSTILE)):
        acts[3 * i, i] = 1.0 + i
    moved = [{"promoted": [(text, 1.0)], "suppressed": [(text, -1.0)]} for text in HOSTILE]
    contrasts = [Contrast(HOSTILE[1], HOSTILE[0], HOSTILE[1]), Contrast(HOSTILE[0], HOSTILE[1], HOSTILE[0])]
    given = {"contrasts": contrasts, "promoted": moved, "title": HOSTILE[1], "meta": {HOSTILE[0]: HOSTILE[1]}}
    return build_state(tokens, groups, acts, **given | options)
