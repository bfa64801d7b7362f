"""A report made by hand, of about the size that the demo gives."""

import re

import numpy as np
import pytest

from interp_jax.models.promoted_tokens import TokenLogit
from interp_jax.report import (
    DemoReport,
    DictionaryScore,
    LatentDashboard,
    LoopExample,
    Setting,
    SiteRow,
    Snippet,
    SteeredText,
    SteeringSample,
    TrainingCurve,
)

TEXT = """\
The river was navigable for small boats as far as the mill, where a weir had been built in 1834 to feed the
wheel.↵ In the spring of that year the council voted to rebuild the bridge in stone, and the old timbers were
sold at auction to a shipwright from the lower town. Its piers stand on oak piles driven through the gravel
into blue clay, and the two middle spans are wider than the others so that barges with lowered masts could
pass beneath at high water. Travellers noted that the toll was taken at the northern gate only, which gave
rise to a proverb about paying once for a road that is walked twice."""


def make_report(n_latents: int = 20, seed: int = 0) -> DemoReport:
    rng = np.random.default_rng(seed)
    words = [w.replace("\n", " ") for w in re.findall(r"\s?\w{1,7}|[^\w\s]", TEXT)]

    def snippet(highest: float) -> Snippet:
        start = int(rng.integers(0, len(words) - 24))
        activations = np.where(rng.random(23) < 0.2, rng.random(23) * highest * 0.8, 0.0)
        activations[14] = highest
        return Snippet(tuple(words[start : start + 23]), tuple(float(a) for a in activations), 14)

    def logits(sign: int) -> tuple[TokenLogit, ...]:
        return tuple(TokenLogit(words[int(rng.integers(len(words)))], float(sign * (3 - 0.2 * i))) for i in range(10))

    def dashboard(latent: int) -> LatentDashboard:
        highest = float(rng.gamma(4.0, 2.0))
        snippets = tuple(snippet(highest * 0.93**i) for i in range(6))
        return LatentDashboard(latent, float(10 ** rng.uniform(-4, -1)), highest, snippets, logits(1), logits(-1))

    steps = np.arange(0, 2000, 20)
    sites = ("resid_pre", "attn_in", "q", "k", "v", "attn_probs", "attn_heads", "attn_out", "mlp_out", "resid_post")
    return DemoReport(
        title="A sparse dictionary for layer 15 of SmolLM2-135M",
        summary=(
            "The residual stream after layer 15 of a language model was read through a for loop over its sites.",
            "A TopK sparse autoencoder was trained on 262,144 of its activations and measured on held-out text.",
            "Its latents were read, recoded by gradient pursuit, and one of them was used to steer the model.",
        ),
        setting=Setting(
            model="SmolLM2-135M-Instruct",
            model_loss=3.1132,
            reference_loss=3.11,
            site="resid_post",
            layer=15,
            n_layers=30,
            d_in=576,
            d_sae=4608,
            n_tokens_streamed=262144,
            n_tokens_trained=1048576,
            n_tokens_held_out=32768,
            text="92 articles of the English Wikipedia (CC BY-SA)",
            seconds=731.4,
            versions=(("interp_jax", "0.1.0"), ("jax", "0.10.2")),
        ),
        scores=(
            DictionaryScore("SAE encoder", 32.0, 0.2134, 0.0213, 3.11, 3.61, 9.81, 8.94, 0.925, 0.914),
            DictionaryScore("gradient pursuit", 31.9, 0.1722, 0.0113, 3.11, 3.48, 9.81, 8.94, 0.945, 0.937),
        ),
        training_curve=TrainingCurve(
            tuple(int(s) for s in steps), tuple(0.2 + 0.8 * np.exp(-steps / 300) + 0.01 * rng.random(len(steps)))
        ),
        densities=tuple(np.where(rng.random(4608) < 0.02, 0.0, 10 ** rng.normal(-2.6, 0.6, 4608)).clip(0, 1).tolist()),
        loop=LoopExample(
            code=(
                "for layer, name, value in (running := ij.iterate(model)(params, tokens)):\n"
                '    if name == "mlp_out" and layer == 6:\n'
                "        running.modified_value = value.at[:, 17].set(0.0)\n"
            ),
            output="layer  0  1.234\nlayer  1  5.678",
        ),
        sites=(
            SiteRow(None, "embed", (1, 16, 576), "float32"),
            *(SiteRow(layer, name, (1, 16, 576), "float32") for layer in range(30) for name in sites),
            SiteRow(None, "logits", (1, 16, 49152), "float32"),
        ),
        steering=tuple(
            SteeringSample(
                prompt=prompt,
                latent=1234,
                description="Added at every position; a coefficient of 1 is the decoder row, of norm 1.",
                unsteered=" was a small place with a market on Thursdays, and nothing in it had ever changed.",
                steered=(
                    SteeredText(
                        20.0, " was a river town, built where two streams met below the old stone bridge of the mill."
                    ),
                    SteeredText(
                        60.0, " river river bridge the the river water river bridge\nwater river the river the water"
                    ),
                ),
            )
            for prompt in ("The town where she was born", "My favourite place is")
        ),
        latents=tuple(dashboard(int(latent)) for latent in np.sort(rng.choice(4608, n_latents, replace=False))),
        latents_chosen="Drawn at random from the latents that are alive and active on at most a tenth of the tokens.",
    )


@pytest.fixture(scope="session")
def report() -> DemoReport:
    return make_report()
