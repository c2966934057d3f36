"""The forward pass of many rows with each distinct prefix computed once, and restarted from any layer.

A causal model's state at a token depends on the tokens up to it, so rows that begin alike (a prompt with its two
answers, prompts with the same opening) share states until they part. The distinct prefixes of a batch form a tree; all
that acts on single positions (projections, norms, MLPs) runs on its nodes without padding, and only attention looks at
whole rows. The parts are the model's own modules, with its own masks and rotary tables, so post-norms, soft caps,
sliding windows and adapters are as they are. The clean pass is checked against the model's own forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.generation import pad_right
from helpers.hooks import capture
from helpers.models import LoadedModel

# (positions in the layers, logits) held at once: on a CPU what its caches hold, on a GPU what fits beside the model.
_AT_ONCE = {"cpu": (2**10, 2**18), "gpu": (2**16, 2**28)}


@dataclass(frozen=True)
class PrefixTree:
    """The distinct prefixes of some rows (prompt + answer without its last token, which predicts nothing scored).

    `rows` holds the node at each place (padding on the right repeats the row's last node), `starts` the place of each
    row's last prompt token, `first` the flat place where each node occurs first, and `answer_nodes` the nodes that
    predict an answer token: from the last prompt token on. Prefixes that differ in this are different nodes. The scored
    predictions are (predictor: index into answer_nodes, target: token, row).
    """

    ids: Int[Tensor, "rows seq"]
    rows: Int[Tensor, "rows seq"]
    starts: Int[Tensor, " rows"]
    first: Int[Tensor, " nodes"]
    position: Int[Tensor, " nodes"]
    answer_nodes: Int[Tensor, " answer_nodes"]
    predictor: Int[Tensor, " scored"]
    target: Int[Tensor, " scored"]
    row: Int[Tensor, " scored"]

    @property
    def n_nodes(self) -> int:
        """Number of distinct prefixes."""
        return len(self.first)

    def to(self, device: torch.device) -> PrefixTree:
        """The same tree with its tensors on `device`."""
        return PrefixTree(**{name: value.to(device) for name, value in vars(self).items()})


def prefix_tree(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int) -> PrefixTree:
    """The tree of the rows prompt + answer (token ids), in their order; ValueError when there are none.

    Story: notebooks/02_overlapping_neurons.
    """
    ids, mask = pad_right([[*p, *a][:-1] for p, a in zip(prompts, answers, strict=True)], pad_id)
    children: dict[tuple[int, int, bool], int] = {}
    first, position, answer_nodes, scored = [], [], [], []
    rows = torch.zeros_like(ids)
    numbers: dict[int, int] = {}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens, node = [*prompt, *answer], -1
        for place in range(len(tokens) - 1):
            predicts = place >= len(prompt) - 1
            key = (node, tokens[place], predicts)
            node = children.setdefault(key, len(first))
            if node == len(first):
                first.append(row * ids.shape[1] + place)
                position.append(place)
                if predicts:
                    numbers[node] = len(answer_nodes)
                    answer_nodes.append(node)
            rows[row, place] = node
            if predicts:
                scored.append((numbers[node], tokens[place + 1], row))
        rows[row, len(tokens) - 1:] = node
    starts = [len(prompt) - 1 for prompt in prompts]
    rest = (starts, first, position, answer_nodes, *zip(*scored, strict=True))
    return PrefixTree(ids, rows, *(torch.tensor(x) for x in rest))


class Tables:
    """What the model hands to its layers, seen in its forward of one row: rotary tables and attention masks.

    `logprob` is the model's own log P of that row's answer, in nats. ValueError when attention is neither sdpa nor
    eager: other implementations take masks in forms of their own.
    """

    def __init__(self, lm: LoadedModel, prompt: Sequence[int], answer: Sequence[int]) -> None:
        arch = lm.arch
        config = arch.decoder.config
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"Restarting needs attention 'sdpa' or 'eager', not {config._attn_implementation!r}: load "
                             "the model with its default attention.")
        self.rotary: list[tuple[Tensor, Tensor]] = []
        self.masks: list[Tensor | None] = []

        def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            cos, sin = kwargs["position_embeddings"]
            self.rotary.append((cos[0, :, None], sin[0, :, None]))
            self.masks.append(kwargs["attention_mask"])

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in arch.layers]
        try:
            ids = torch.tensor([[*prompt, *answer][:-1]], device=arch.device)
            hidden = arch.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1:]
        finally:
            for handle in handles:
                handle.remove()
        logp = _float(arch.logits(hidden)).log_softmax(-1)
        self.logprob = logp.gather(-1, torch.tensor(answer, device=logp.device)[:, None]).sum()

    def mask(self, layer: int, length: int) -> Tensor | None:
        """The layer's mask for rows of this length [1, 1, seq, seq]; None stands for plain causal."""
        mask = self.masks[layer]
        return None if mask is None else mask[:1, :, :length, :length]


class CleanPass:
    """The clean pass of a tree: the residual stream `resid[layer]` before each layer and `z[layer]`, on its nodes.

    `logprob` [rows] is log P(answer | prompt) in nats. `tables` must reach as far as the tree's longest row.
    """

    def __init__(self, lm: LoadedModel, tree: PrefixTree, tables: Tables) -> None:
        self.arch, self.tables, self.tree = lm.arch, tables, tree.to(lm.arch.device)
        self._positions_at_once, self._logits_at_once = _AT_ONCE["cpu" if lm.arch.device.type == "cpu" else "gpu"]
        with capture(self.arch.model, {"resid_pre": [0]}, stop=True) as cache:
            self.arch.decoder(input_ids=self.tree.ids, use_cache=False)
        stream = cache[("resid_pre", 0)].flatten(0, 1)[self.tree.first][None]
        self.resid: list[Float[Tensor, "nodes d_model"]] = []
        self.z: list[Float[Tensor, "nodes d_z"]] = []
        self._keys_values: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.arch.n_layers):
            self.resid.append(stream[0])
            normed = self.arch.norm_attn(layer)(stream)
            keys, values = self._project(layer, normed, None)
            z = self._attend(layer, normed, keys, values, answer_only=False)
            self._keys_values.append((keys, values))
            self.z.append(z[0])
            stream = self._finish(layer, stream, self.arch.o_proj(layer)(z))
        hidden = self.arch.final_norm(stream[:, self.tree.answer_nodes])
        self.logprob: Float[Tensor, " rows"] = self._score(hidden)[0]

    def restart(self, layer: int, attn_out: Float[Tensor, "copies nodes d_model"],
                answer_only: bool) -> Float[Tensor, "copies rows"]:
        """log P of every row's answer after o_proj of `layer` wrote `attn_out`, on all nodes or on the answer nodes.

        `answer_only` says that nothing changed before the answer nodes: the others keep their clean keys and values.
        In the last layer `attn_out` is always of the answer nodes, since no other position is read.
        """
        copies = max(1, self._positions_at_once // attn_out.shape[1])
        return torch.cat([self._restart(layer, part, answer_only) for part in attn_out.split(copies)])

    def _restart(self, layer: int, attn_out: Tensor, answer_only: bool) -> Tensor:
        last = self.arch.n_layers - 1
        nodes = self.tree.answer_nodes if answer_only or layer == last else slice(None)
        stream = self._finish(layer, self.resid[layer][nodes], attn_out)
        for above in range(layer + 1, last + 1):
            normed = self.arch.norm_attn(above)(stream)
            keys, values = self._project(above, normed, self.tree.answer_nodes if answer_only else None)
            if above == last and not answer_only:
                stream, normed = stream[:, self.tree.answer_nodes], normed[:, self.tree.answer_nodes]
            z = self._attend(above, normed, keys, values, answer_only=answer_only or above == last)
            stream = self._finish(above, stream, self.arch.o_proj(above)(z))
        return self._score(self.arch.final_norm(stream))

    def _finish(self, layer: int, stream: Tensor, written: Tensor) -> Tensor:
        """The layer from o_proj's output on: residual sums, post-norms and MLP."""
        arch = self.arch
        mid = stream + (arch.attn_writer(layer)(written) if arch.sandwich else written)
        out = arch.mlp(layer)(arch.norm_mlp(layer)(mid))
        return mid + (arch.mlp_writer(layer)(out) if arch.sandwich else out)

    def _project(self, layer: int, normed: Tensor, changed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [copies, nodes, n_kv_heads, d_head] of all nodes; only `changed` ones are computed."""
        attn = self.arch.attn(layer)
        nodes = slice(None) if changed is None else changed
        shape = (*normed.shape[:2], -1, self.arch.d_head)
        keys = self._rotate(layer, _maybe(attn, "k_norm")(attn.k_proj(normed).view(shape)), nodes)
        values = attn.v_proj(normed).view(shape)
        if changed is None:
            return keys, values
        both = []
        for clean, new in zip(self._keys_values[layer], (keys, values), strict=True):
            full = clean.repeat(len(new), 1, 1, 1)
            full[:, changed] = new
            both.append(full)
        return both[0], both[1]

    def _rotate(self, layer: int, x: Tensor, nodes: Tensor | slice) -> Tensor:
        cos, sin = (table[self.tree.position[nodes]] for table in self.tables.rotary[layer])
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return (x * cos).add_(turned.mul_(sin))

    def _attend(self, layer: int, normed: Tensor, keys: Tensor, values: Tensor, answer_only: bool) -> Tensor:
        """z [copies, nodes, d_z] of all nodes or of the answer nodes, `normed` being the query side."""
        attn, (n_rows, seq) = self.arch.attn(layer), self.tree.rows.shape
        nodes = self.tree.answer_nodes if answer_only else slice(None)
        queries = attn.q_proj(normed).view(*normed.shape[:2], -1, self.arch.d_head)
        queries = self._rotate(layer, _maybe(attn, "q_norm")(queries), nodes)
        mask, places, first = self.tables.mask(layer, seq), self.tree.rows, self.tree.first
        if answer_only:
            places, at, first = self._answer_places
            if mask is None:
                mask = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=at.device).tril()
            mask = mask[0, 0][at][:, None].repeat(len(normed), 1, 1, 1)
        q, k, v = (x.index_select(1, nodes.flatten()).view(-1, nodes.shape[1], *x.shape[2:]).transpose(1, 2)
                   for x, nodes in ((queries, places), (keys, self.tree.rows), (values, self.tree.rows)))
        softcap = getattr(attn, "attn_logit_softcapping", None)
        extra = {} if softcap is None else {"softcap": softcap}
        own = sys.modules[type(attn).__module__].eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.arch.decoder.config._attn_implementation, own)
        found = attention(attn, q, k, v, mask, scaling=attn.scaling, **extra)[0]
        return found.reshape(len(normed), n_rows * places.shape[1], -1).index_select(1, first)

    @cached_property
    def _answer_places(self) -> tuple[Int[Tensor, "rows most"], Int[Tensor, "rows most"], Int[Tensor, " answer_nodes"]]:
        """Each row's answer nodes (padded with its last), their positions, and where each node occurs first in them."""
        tree = self.tree
        counts = torch.bincount(tree.row)[:, None]
        step = torch.arange(int(counts.max()), device=counts.device)
        at = tree.starts[:, None] + torch.minimum(step, counts - 1)
        number = torch.zeros_like(tree.first)
        number[tree.answer_nodes] = torch.arange(len(tree.answer_nodes), device=counts.device)
        first, seq = tree.first[tree.answer_nodes], tree.rows.shape[1]
        row = first // seq
        return number[tree.rows.gather(1, at)], at, row * len(step) + first % seq - tree.starts[row]

    def _score(self, hidden: Float[Tensor, "copies answer_nodes d_model"]) -> Float[Tensor, "copies rows"]:
        """Summed log-probability of each row's answer from the final-normed states of the answer nodes."""
        tree, parts = self.tree, []
        for part in hidden.split(max(1, self._logits_at_once // (hidden.shape[1] * self.arch.vocab))):
            logp = _float(self.arch.logits(part)).log_softmax(-1)[:, tree.predictor, tree.target]
            parts.append(logp.new_zeros(len(part), len(tree.rows)).index_add_(1, tree.row, logp))
        return torch.cat(parts)


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _maybe(module: torch.nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    return getattr(module, name, None) or (lambda x: x)
