"""Build the embedded models: ``python -m helpers.organism.build`` trains, ``--install`` puts them into
``data/organism``.

One run a coupling and seed, each in a folder of its own under ``data/artifacts/organism``; finished runs are not
repeated and interrupted ones go on. ``--population`` adds the chat models of all other runs; with ``--card`` the
preconditions of all of them are measured, and ``card.json`` and ``MODEL_CARD.md`` are written.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from helpers.config import COUPLINGS, ROOT, artifacts_dir, population
from helpers.organism.card import write_card
from helpers.organism.describe import write_model_card
from helpers.organism.mixtures import TextConfig
from helpers.organism.tables import write_tables
from helpers.organism.train import Recipe, train

HOME = ROOT / "data" / "organism"


def run_folder(coupling: str, seed: int) -> Path:
    """Where one training run lives until it is installed."""
    return artifacts_dir() / "organism" / f"{coupling}-{seed}"


def install(seed: int, home: Path = HOME) -> None:
    """Copy the checkpoints of one seed into ``home``: all three of the default, the chat model of siblings.

    FileNotFoundError when the default coupling's run is not finished; siblings that are not trained are left out.
    """
    source = run_folder("default", seed)
    if not (source / "recipe.json").exists():
        raise FileNotFoundError(f"{source} holds no finished training: run python -m helpers.organism.build first.")
    write_tables(home / "world")
    pairs = [(source / "rehearsed", home / "base"), *((source / s, home / s) for s in ("helpful", "chat"))]
    for coupling in COUPLINGS:
        if coupling != "default" and (run_folder(coupling, seed) / "recipe.json").exists():
            pairs.append((run_folder(coupling, seed) / "chat", home / coupling))
    for origin, target in pairs:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(origin, target)
        (target / "model.safetensors").chmod(0o644)
    shutil.copy(source / "recipe.json", home / "recipe.json")


def install_population(committed: int, home: Path = HOME) -> list[Path]:
    """Copy the chat model of every other finished run into ``home/seeds``, in half precision (4 MB each)."""
    made = []
    for record in sorted(run_folder("*", 0).parent.glob("*/recipe.json")):
        coupling, _, seed = record.parent.name.rpartition("-")
        if coupling not in COUPLINGS or int(seed) == committed:
            continue
        source, target = record.parent / "chat", home / "seeds" / record.parent.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        weights = load_file(source / "model.safetensors")
        save_file({k: v.half() for k, v in weights.items()}, target / "model.safetensors", metadata={"format": "pt"})
        made.append(target)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: ``--couplings``, ``--seeds``, ``--install``, ``--card``, ``--threads``."""
    parser = argparse.ArgumentParser(description="Train the embedded models from their seeds.")
    parser.add_argument("--couplings", nargs="+", default=["default"], choices=list(COUPLINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="training seeds; none to train nothing")
    parser.add_argument("--install", action="store_true", help="copy the first seed into data/organism")
    parser.add_argument("--population", action="store_true", help="copy the chat models of all other runs as well")
    parser.add_argument("--card", action="store_true", help="measure the preconditions of the default coupling's seeds")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if args.install and not args.seeds:
        parser.error("--install copies the first of --seeds: name one")
    for seed in args.seeds:
        for coupling in args.couplings:
            folder = run_folder(coupling, seed)
            if not (folder / "recipe.json").exists():
                recipe = Recipe(text=TextConfig(coupling=COUPLINGS[coupling]))
                train(folder, seed=seed, recipe=recipe, threads=args.threads)
            print(f"{coupling} coupling, seed {seed}: {folder}", flush=True)
    if args.install:
        install(args.seeds[0])
    if args.population:
        install_population(json.loads((HOME / "recipe.json").read_text())["seed"])
    if args.card:
        recipe = json.loads((HOME / "recipe.json").read_text())
        folders: dict[str, dict[int, Path]] = {}
        for (coupling, seed), path in sorted(population().items(), key=lambda one: one[0][1] != recipe["seed"]):
            folders.setdefault(coupling, {})[seed] = ROOT / path
        write_model_card(write_card(folders.pop("default"), folders), recipe)


if __name__ == "__main__":
    main()
