"""One door for every SAE: a folder saved by sae-lens, or a public release by name, checked against the model.

Notebook 03 tells the story.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from helpers.hooks import Site, check_site, site_width
from helpers.models import LoadedModel

# Each site's hook in TransformerBridge (what is written), and the names other SAEs use for it.
HOOKS = {
    "z": ("attn.o.hook_in", "attn.hook_z"),
    "resid_pre": ("hook_in", "hook_resid_pre"),
    "resid_mid": ("hook_resid_mid",),
    "resid_post": ("hook_out", "hook_resid_post"),
    "attn_out": ("attn.hook_out", "hook_attn_out"),
    "neurons": ("mlp.out.hook_in", "mlp.hook_post"),
    "mlp_out": ("mlp.hook_out", "hook_mlp_out"),
}


def hook_name(site: str, layer: int) -> str:
    """sae-lens's name of a site, e.g. blocks.3.attn.o.hook_in for z of layer 3."""
    return f"blocks.{layer}.{HOOKS[site][0]}"


def find_site(sae: Any, site: str | None = None, layer: int | None = None) -> Site:
    """The (site, layer) an SAE reads, from its metadata's hook name unless given; ValueError if unknown."""
    name = getattr(getattr(getattr(sae, "cfg", None), "metadata", None), "hook_name", None) or ""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if layer is None and found:
        layer = int(found[1])
    if site is None and found:
        site = next((s for s, names in HOOKS.items() if found[2] in names), None)
    if site is None or layer is None:
        raise ValueError(
            f"The SAE does not say where it reads (hook name {name!r}); pass site='z' and layer=, for example."
        )
    return site, layer


def read_sae(where: Path | str, device: torch.device | str = "cpu") -> SAE:
    """An SAE from a folder saved by sae-lens, or from "release/sae_id"; it reads z with heads side by side.

    Public releases are listed in sae-lens (e.g. "gemma-scope-2b-pt-att/layer_12/width_16k/average_l0_85"); "owner/
    repository/sae_id" reads any repository of the Hub. FileNotFoundError for a missing folder, ValueError for an
    unknown release or id, RuntimeError when a download fails.
    """
    if (Path(where) / "cfg.json").is_file():
        sae = SAE.load_from_disk(where, device=str(device))
    else:
        sae = _download(where, str(device))
    if sae.cfg.reshape_activations == "hook_z":
        sae.turn_off_forward_pass_hook_z_reshaping()
        sae.cfg.reshape_activations = "none"
    return sae.requires_grad_(False).eval()


def load_sae(where: Path | str, lm: LoadedModel, layer: int | None = None, site: str | None = None) -> SAE:
    """The SAE that `where` names (as in read_sae) on the model's device, for z of `layer` unless `site` says otherwise.

    Without layer and site it reads what its own metadata says (find_site). Raises ValueError when its width or its hook
    is not that of the site asked for; errors of read_sae. Story: notebook 03.

    >>> sae = h.load_sae(saes.folders[3], lm)
    >>> sae.W_dec.shape
    torch.Size([1024, 160])
    """
    site = "z" if site is None and layer is not None else site
    sae = read_sae(where, lm.device)
    asked = find_site(sae, site, layer)
    check_site(lm.arch, asked)
    name, at = asked
    if sae.cfg.d_in != (width := site_width(lm.arch, name)):
        raise ValueError(
            f"The SAE in {where} reads vectors of width {sae.cfg.d_in}, but {name} of layer {at} has {width}."
        )
    hook = sae.cfg.metadata.hook_name
    if hook and not any(hook == f"blocks.{at}.{known}" for known in HOOKS[name]):
        raise ValueError(
            f"The SAE in {where} was trained on {hook}, not on {name} of layer {at}: give one of {hook_name(name, at)}."
        )
    return sae


def _download(where: Path | str, device: str) -> SAE:
    release, sae_id = _release(where)
    try:
        return SAE.from_pretrained(release, sae_id, device=device)
    except Exception as error:  # whatever the Hub's client, the network or the release's converter raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RuntimeError(
            f"The SAE {where} is no folder here and could not be downloaded ({reason.rstrip('.')}): "
            "connect to the Hugging Face Hub once, or give a folder saved by sae-lens."
        ) from error


def _release(where: Path | str) -> tuple[str, str]:
    """Release (or repository of the Hub) and id in it."""
    first, _, rest = (text := str(where)).partition("/")
    local = isinstance(where, Path) or not rest or text.startswith((".", "/", "~")) or Path(where).exists()
    known = {} if local else get_pretrained_saes_directory()
    if first in known:
        ids = list(known[first].saes_map)
        if rest not in ids:
            some = ", ".join(ids[:5])
            raise ValueError(f"The release {first} has no SAE {rest!r}: it has {len(ids)}, such as {some}.")
        return first, rest
    parts = [part for part in text.split("/") if part]
    if local or len(parts) < 3:
        raise FileNotFoundError(
            f"There is no SAE in {where}: notebook 03 trains one, or give a folder saved by sae-lens or release/sae_id."
        )
    return "/".join(parts[:2]), "/".join(parts[2:])
