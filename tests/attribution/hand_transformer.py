"""The small models of `small_models.py` written by hand: NumPy in float64, one prompt, layer after layer."""

import math

import numpy as np

from interp_jax.models.transformer import named_parameters, unrolled


def run_by_hand(model, tokens, replaced=()):
    """The logits of a prompt, and every site's value by (layer, name).

    Args:
        model: a `LanguageModel` of `small_model`, stacked or not.
        tokens: one prompt's ids.
        replaced: `(layer, name, index, new)` for each value that is put in as the pass comes by.
    """
    c, params = model.params.config, named_parameters(unrolled(model.params))
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    sites, seq = {}, len(tokens)

    def stop(value, name, layer=None):
        value = value.copy()
        for at, where, index, new in replaced:
            if (at, where) == (layer, name):
                value[index] = new[index]
        sites[layer, name] = value
        return value

    def norm(x, name, rms=False):
        is_layer = c.norm == "layer" and not rms
        x = x - x.mean(-1, keepdims=True) if is_layer else x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon)
        return x * (p[f"{name}.scale"] + c.norm_offset) + (p[f"{name}.bias"] if is_layer else 0)

    def act(x):
        if c.activation == "gelu":
            return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        if c.activation == "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return x / (1 + np.exp(-x))

    def turn(x):
        if c.positions != "rotary":
            return x
        n = c.rotary_dim or c.d_head
        angle = np.arange(seq)[:, None, None] * c.rotary_base ** (-np.arange(0, n, 2) / n)
        one, two, rest = x[..., : n // 2], x[..., n // 2 : n], x[..., n:]
        turned = one * np.cos(angle) - two * np.sin(angle), two * np.cos(angle) + one * np.sin(angle)
        return np.concatenate([*turned, rest], -1)

    def capped(x, cap):
        return x if cap is None else cap * np.tanh(x / cap)

    def mlp(x, layer):
        name = f"blocks.{layer}.mlp"
        linear = x @ p[f"{name}.W_in"] + p.get(f"{name}.b_in", 0)
        pre = stop(x @ p[f"{name}.W_gate"] if c.gated_mlp else linear, "mlp_pre", layer)
        neurons = stop(act(pre) * linear if c.gated_mlp else act(pre), "mlp_act", layer)
        return neurons @ p[f"{name}.W_out"] + p.get(f"{name}.b_out", 0)

    x = p["W_embed"][tokens] * c.embed_scale
    x = stop(x + p["W_pos"][:seq] if c.positions == "learned" else x, "embed")
    for layer in range(c.n_layers):
        here = f"blocks.{layer}"
        x = stop(x, "resid_pre", layer)
        inputs = norm(x, f"{here}.attn_norm")
        values = {}
        for name in "qkv":
            value = np.einsum("sd,dhe->she", inputs, p[f"{here}.attn.W_{name}"]) + p.get(f"{here}.attn.b_{name}", 0)
            if c.qk_norm and name != "v":
                value = norm(value, f"{here}.attn.{name}_norm", rms=True)
            values[name] = stop(turn(value) if name != "v" else value, name, layer)
        k, v = (np.repeat(values[name], c.n_heads // c.n_kv_heads, axis=1) for name in "kv")
        scores = capped(np.einsum("qhe,khe->hqk", values["q"], k) / math.sqrt(c.d_head), c.attn_soft_cap)
        distance = np.arange(seq)[:, None] - np.arange(seq)
        is_seen = (distance >= 0) & ((distance < c.window) if c.is_local[layer] else True)
        scores = np.where(is_seen, scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs = stop(probs / probs.sum(-1, keepdims=True), "attn_probs", layer)
        heads = stop(np.einsum("hqk,khe->qhe", probs, v), "attn_heads", layer)
        attn_out = np.einsum("qhe,hed->qd", heads, p[f"{here}.attn.W_o"]) + p.get(f"{here}.attn.b_o", 0)
        if c.post_norms:
            attn_out = norm(attn_out, f"{here}.attn_post_norm")
        attn_out = stop(attn_out, "attn_out", layer)
        mlp_out = mlp(norm(x if c.parallel_residual else x + attn_out, f"{here}.mlp_norm"), layer)
        if c.post_norms:
            mlp_out = norm(mlp_out, f"{here}.mlp_post_norm")
        mlp_out = stop(mlp_out, "mlp_out", layer)
        x = stop(x + attn_out + mlp_out, "resid_post", layer)
    x = norm(x, "final_norm")
    logits = x @ (p["W_embed"].T if c.tied_embeddings else p["W_unembed"]) + p.get("b_unembed", 0)
    return capped(logits, c.logit_soft_cap), sites
