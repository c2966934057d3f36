"""Influence of every head: restarting against the usual loop, and against a tuned batched loop."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import interleaved, keep, ratio
from helpers.generation import batches, pad_right
from helpers.heads.influence import influence, influence_flops, prefix_trees
from helpers.hooks import ablate_heads
from helpers.models import LoadedModel, load_model
from helpers.prompts import misconceptions, requests


def usual_loop(lm: LoadedModel, users: list[str], answers: list[str]) -> torch.Tensor:
    """The field's usual code: one forward per head and row, a hook that zeroes the head, logits of every position."""
    arch, rows = lm.arch, []
    for user, answer in zip(users, answers, strict=True):
        prompt, target = lm.prompt_ids(user), lm.answer_ids(answer)
        ids = torch.tensor([prompt + target])

        def logprob(ids=ids, target=target) -> torch.Tensor:
            logp = lm.model(input_ids=ids, use_cache=False).logits[0, -len(target) - 1:-1].log_softmax(-1)
            return logp.gather(-1, ids[0, -len(target):, None]).sum()

        clean = logprob()
        for layer in range(arch.n_layers):
            for head in range(arch.n_heads):
                place = slice(head * arch.d_head, (head + 1) * arch.d_head)

                def zero(module, args, place=place):
                    z = args[0].clone()
                    z[..., place] = 0
                    return (z,)

                handle = arch.o_proj(layer).register_forward_pre_hook(zero)
                rows.append(clean - logprob())
                handle.remove()
    return torch.stack(rows).view(len(users), arch.n_layers, arch.n_heads)


def tuned_loop(lm: LoadedModel, users: list[str], answers: list[str], batch_size: int = 64) -> torch.Tensor:
    """The same, tuned: rows sorted by length and padded on the right, no logits but those that score an answer."""
    arch = lm.arch
    prompts, tails = [lm.prompt_ids(user) for user in users], [lm.answer_ids(answer) for answer in answers]
    found = torch.empty(len(users), arch.n_layers, arch.n_heads)
    for rows in batches([len(p) + len(a) for p, a in zip(prompts, tails, strict=True)], batch_size):
        ids, mask = pad_right([prompts[i] + tails[i] for i in rows], lm.pad_id)
        starts = torch.tensor([len(prompts[i]) - 1 for i in rows])
        scored = mask[:, 1:] & (torch.arange(ids.shape[1] - 1) >= starts[:, None])
        inputs, targets, row = ids[:, :-1], ids[:, 1:][scored][:, None], scored.nonzero()[:, 0]

        def logprob(inputs=inputs, scored=scored, targets=targets, row=row) -> torch.Tensor:
            hidden = arch.decoder(input_ids=inputs, use_cache=False).last_hidden_state[scored]
            logp = arch.logits(hidden).log_softmax(-1).gather(-1, targets)[:, 0]
            return torch.zeros(len(inputs)).index_add_(0, row, logp)

        clean = logprob()
        for layer in range(arch.n_layers):
            for head in range(arch.n_heads):
                with ablate_heads(lm.model, [(layer, head)]):
                    found[rows, layer, head] = clean - logprob()
    return found


def both_answers(kind: str, n: int) -> tuple[list[str], list[str]]:
    """Prompts twice, with the two answers that a score compares; of the split that choices are made on."""
    if kind == "facts":
        rows = misconceptions("val", n)
        users, pairs = [row["question"] for row in rows], [(row["wrong"][0], row["right"]) for row in rows]
    else:
        rows = requests("harmful", "val", n)
        users, pairs = [row["prompt"] for row in rows], [(row["refusal"], row["compliance"]) for row in rows]
    return users * 2, [answer for pair in zip(*pairs, strict=True) for answer in pair]


def test_influence_of_all_heads():
    """The job of notebook 02: wrong and right answers to questions, refusal and compliance to requests."""
    lm = load_model("data/organism/chat", device="cpu", dtype="float32")
    sets = {kind: both_answers(kind, 16) for kind in ("facts", "requests")}
    found, total = {"clock": "CPU time", "heads": lm.arch.n_layers * lm.arch.n_heads}, {}
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_operations}
    for kind, (users, answers) in sets.items():
        with torch.inference_mode():
            ours = influence(lm, users, answers).values
            for loop in (usual_loop, tuned_loop):
                torch.testing.assert_close(ours, loop(lm, users, answers), atol=2e-4, rtol=1e-4)
            trials = interleaved({n: lambda n=n: tuned_loop(lm, users, answers, n) for n in (8, 16, 32)}, 3)  # noqa: B023
            best = min(trials, key=lambda n: trials[n].min())
            ways = {
                "usual": lambda: usual_loop(lm, users, answers),  # noqa: B023
                "tuned": lambda: tuned_loop(lm, users, answers, best),  # noqa: B023
                "ours": lambda: influence(lm, users, answers),  # noqa: B023
                "answer span": lambda: influence(lm, users, answers, span="answer"),  # noqa: B023
            }
            seconds = interleaved(ways, warm=True)  # compared above
        bound = influence_flops(lm.arch, prefix_trees(lm, users, answers))
        operations = {}
        for way in ("usual", "tuned", "ours"):
            with FlopCounterMode(display=False, custom_mapping=attention) as counter, torch.inference_mode():
                ways[way]()
            operations[way] = counter.get_total_flops()
        found |= {f"{kind}: rows": len(users), f"{kind}: batch size of the tuned loop": best,
                  f"{kind}: operations done / the algorithm's bound": round(operations["ours"] / bound, 3),
                  **{f"{kind}: operations of the {way} loop / ours": round(operations[way] / operations["ours"], 2)
                     for way in ("usual", "tuned")}}
        found |= ratios(f"{kind}: ", seconds)
        total = {way: total.get(way, 0) + seconds[way] for way in ways}
    keep("influence", found | ratios("both: ", total))


def ratios(name: str, seconds: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {
        f"{name}usual loop / ours (target 10)": ratio(seconds["usual"], seconds["ours"]),
        f"{name}tuned loop / ours (target 2.5)": ratio(seconds["tuned"], seconds["ours"]),
        f"{name}tuned loop / ours, answer span": ratio(seconds["tuned"], seconds["answer span"]),
    }


def sdpa_operations(query, key, value, *args, **kwargs) -> int:
    batch, heads, n_queries, d = query
    return 4 * batch * heads * n_queries * key[2] * d
