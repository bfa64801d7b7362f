"""Training what a study compares, so that an interrupted study goes on.

What differs in learning rate and coefficient alone is trained in one program (`sweep`). Such a group has one seed, that
of its initial weights and of its batches: the spread over seeds then holds all that chance decides. Each
group's folder is named by its settings. It holds checkpoints, and the judgement once there is one.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from interp_jax.activations.store import ActivationStore
from interp_jax.progress import advancing, note
from interp_jax.sae import SweepRun, TrainConfig, sweep
from interp_jax.whole_file import write_whole

__all__ = ["BATCH_SIZE", "Group", "sweep_resumed", "trained_and_judged"]

BATCH_SIZE = 512
"""Activations a training step."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Autoencoders that are trained together."""

    method: str
    """What the study compares this group with others for."""
    configs: tuple[TrainConfig, ...]
    """They agree in the seed, and in all else that `sweep` asks for."""
    start: tuple[float, ...] = ()
    """Numbers of the study's own that decide how training starts."""

    @property
    def name(self) -> str:
        """Of its folder: the method, the seed, and a digest of everything else."""
        configs = [dataclasses.asdict(config) for config in self.configs]
        settings = json.dumps([BATCH_SIZE, *self.start, *configs])
        return f"{self.method}-{self.configs[0].seed}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


Train = Callable[[Group, Callable[[int], Any], pathlib.Path], Sequence[SweepRun]]
"""From a group, its batches by step, and a folder for checkpoints, to its runs."""


def sweep_resumed(group: Group, batches: Callable[[int], Any], directory: pathlib.Path) -> list[SweepRun]:
    """Trains a group in one program, on from its last checkpoint.

    Args:
        group: the group.
        batches: by step.
        directory: of the checkpoints.
    """
    configs = group.configs
    per_step = len(configs) * BATCH_SIZE
    with advancing(f"Training {len(configs)} autoencoders", configs[0].n_steps * per_step, unit="activations") as done:
        return sweep(
            configs, batches, on_step=lambda number, metrics: done(per_step), checkpoint_dir=directory, resume=True
        )


def trained_and_judged(
    groups: Sequence[Group],
    store: ActivationStore,
    judge: Callable[[SweepRun], dict[str, Any]],
    cache: pathlib.Path,
    train: Train = sweep_resumed,
) -> list[dict[str, Any]]:
    """Trains and judges every group that was not yet.

    Args:
        groups: what to train, in this order.
        store: the activations.
        judge: what is to be known of a run; JSON.
        cache: the folder of the groups' folders.
        train: how a group is trained.

    Returns:
        One dictionary a run: its `method`, `seed`, `learning_rate` and `l1_coefficient`, and what `judge` gave.
    """
    found = []
    for number, group in enumerate(groups):
        path = cache / group.name / "judged.json"
        if not path.exists():
            note(f"{group.method}, group {number + 1} of {len(groups)}")
            batches = store.shuffled(BATCH_SIZE, seed=group.configs[0].seed)
            runs = train(group, batches, path.parent / "training")
            write_whole(path, json.dumps([{**_facts(group, run.config), **judge(run)} for run in runs], indent=1))
        found += json.loads(path.read_text(encoding="utf-8"))
    return found


def _facts(group: Group, config: TrainConfig) -> dict[str, Any]:
    names = ("seed", "learning_rate", "l1_coefficient", "k", "d_sae", "architecture")
    return {"method": group.method, **{name: getattr(config, name) for name in names}}
