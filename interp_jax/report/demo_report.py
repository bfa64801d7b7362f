"""What the demo found, as plain data: the page and `results.json` are two ways to write the same object.

Nothing here is a JAX array, a model or an open file, so a report can be made in a test by hand, kept, and compared.
Numbers that were not measured are None, never 0 or NaN: a table shows a dash for them.

Losses are in nats a token. The loss recovered is (ablated - spliced) / (ablated - clean): 1 where the splice costs
nothing, 0 where it is as bad as the ablation.
"""

import dataclasses

from interp_jax.models.promoted_tokens import TokenLogit

__all__ = [
    "DemoReport",
    "DictionaryScore",
    "LatentDashboard",
    "LoopExample",
    "Setting",
    "SiteRow",
    "Snippet",
    "SteeredText",
    "SteeringSample",
    "TrainingCurve",
]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was run on what."""

    model: str
    """The model's name."""
    model_loss: float
    """Its loss on the text, measured here."""
    reference_loss: float
    """The loss that it must have if it was loaded rightly."""
    site: str
    """The site that the dictionary is for."""
    layer: int
    """Its layer."""
    n_layers: int
    """How many layers the model has."""
    d_in: int
    """The activation's width."""
    d_sae: int
    """How many latents the dictionary has."""
    n_tokens_streamed: int
    """Tokens whose activations were streamed for training, each counted once."""
    n_tokens_trained: int
    """Activations that the training steps took, repeats counted."""
    n_tokens_held_out: int
    """Held-out tokens that the scores are from."""
    text: str
    """Where the text is from and on what terms."""
    seconds: float | None = None
    """Wall-clock time of the whole run."""
    versions: tuple[tuple[str, str], ...] = ()
    """Name and version of what was used, for example `("jax", "0.10.2")`."""


@dataclasses.dataclass(frozen=True)
class DictionaryScore:
    """How well one way of coding activations in the dictionary does on held-out text."""

    method: str
    """How the codes were found, for example `SAE encoder`."""
    l0: float
    """Mean number of latents active on a token."""
    fvu: float
    """Fraction of variance unexplained."""
    dead_share: float | None
    """Share of latents that no held-out token activates."""
    loss_clean: float
    """The model's loss, left alone."""
    loss_spliced: float
    """Its loss with the activation replaced by its reconstruction."""
    loss_zero_ablated: float
    """Its loss with the activation replaced by zero."""
    loss_mean_ablated: float
    """Its loss with the activation replaced by its mean."""
    loss_recovered_zero: float
    """The loss recovered, measured against zero ablation."""
    loss_recovered_mean: float
    """The loss recovered, measured against mean ablation, which is the harder test."""


@dataclasses.dataclass(frozen=True)
class TrainingCurve:
    """A quantity over the training steps."""

    steps: tuple[int, ...]
    """Training steps."""
    values: tuple[float, ...]
    """The quantity at each of them."""
    label: str = "fraction of variance unexplained"
    """What it is, with its unit."""


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One site of the model's forward pass."""

    layer: int | None
    """The layer, None for those outside the blocks."""
    name: str
    """The site's name."""
    shape: tuple[int, ...]
    """The value's shape."""
    dtype: str
    """The value's dtype."""


@dataclasses.dataclass(frozen=True)
class LoopExample:
    """The for loop at work: code that ran, and what it printed."""

    code: str
    """Python source."""
    output: str
    """What it printed."""


@dataclasses.dataclass(frozen=True)
class SteeredText:
    """What the model said with one coefficient."""

    coefficient: float
    """How many times the direction was added."""
    text: str
    """The continuation."""


@dataclasses.dataclass(frozen=True)
class SteeringSample:
    """One prompt continued with and without a latent's direction."""

    prompt: str
    """The prompt."""
    latent: int
    """The latent whose decoder row was added."""
    description: str
    """In words: where it was added, and what a coefficient of 1 is."""
    unsteered: str
    """The continuation with nothing added."""
    steered: tuple[SteeredText, ...]
    """The continuations with it added."""


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A stretch of text around the place where a latent is most active."""

    tokens: tuple[str, ...]
    """One printable string a token."""
    activations: tuple[float, ...]
    """The latent's activation on each of them."""
    peak: int
    """Which of them has the highest activation."""


@dataclasses.dataclass(frozen=True)
class LatentDashboard:
    """What is shown of one latent."""

    latent: int
    """Its index in the dictionary."""
    density: float
    """Share of tokens on which it is active."""
    max_activation: float
    """Its highest activation on these tokens."""
    snippets: tuple[Snippet, ...]
    """Where it is most active, highest first."""
    promoted: tuple[TokenLogit, ...]
    """The tokens whose logits its direction raises most, highest first."""
    suppressed: tuple[TokenLogit, ...]
    """The tokens whose logits it lowers most, lowest first."""


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """All that the demo's page shows."""

    title: str
    """The page's title."""
    summary: tuple[str, ...]
    """What was done, one sentence an item."""
    setting: Setting
    """What was run on what."""
    scores: tuple[DictionaryScore, ...]
    """One entry a way of coding; the first is the SAE's own encoder."""
    training_curve: TrainingCurve
    """How training went."""
    densities: tuple[float, ...]
    """The density of every latent on held-out text, 0 for dead ones."""
    loop: LoopExample
    """The for loop at work."""
    sites: tuple[SiteRow, ...]
    """The model's site table."""
    steering: tuple[SteeringSample, ...]
    """Steered texts beside unsteered ones."""
    latents: tuple[LatentDashboard, ...]
    """The latents shown."""
    latents_chosen: str = ""
    """How these latents were chosen, in one sentence."""
