"""SAELens' layout on disk: `cfg.json` and `sae_weights.safetensors`, so that other tools read what is trained here.

SAELens has no BatchTopK or Matryoshka outside training: it saves them as `jumprelu` with their threshold, and so does
this module. Its transcoders have ReLU or JumpReLU codes, and never subtract `b_dec` from the input; where ours do, or
are gated, they are written in an equal form (`equivalents`). TopK codes with a skip, or another width of output, have
no name there and are refused.

Reading takes every form that SAELens has written since its version 1: configs from before 6.0, `log_threshold`, half
precision, folders of unfinished training runs. What SAELens computes around the weights is folded into them where that
is exact: `rescale_acts_by_decoder_norm`, `finetuning_scaling_factor`, one scale for all activations
(`expected_average_only_in`) and whitening. A normalisation that depends on each activation is refused.

`reshape_activations: hook_z` changes no weight: give such an autoencoder the heads side by side, `[..., n_heads *
d_head]`.
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from packaging.version import InvalidVersion, Version

from interp_jax.sae.autoencoder import SparseAutoencoder
from interp_jax.sae.batch_topk import BatchTopKSAE
from interp_jax.sae.equivalents import as_jumprelu, uncentred
from interp_jax.sae.gated import GatedSAE
from interp_jax.sae.jumprelu import JumpReLUSAE
from interp_jax.sae.matryoshka import MatryoshkaSAE
from interp_jax.sae.relu import ReLUSAE
from interp_jax.sae.topk import TopKSAE
from interp_jax.sae.weights_files import (
    build,
    check_checksum,
    check_tensors,
    drop_unit_scaling,
    option,
    read_config,
    read_safetensors,
    stored_arrays,
    write_weights_and_config,
)

__all__ = ["SAELENS_WEIGHTS", "load_saelens", "save_saelens"]

SAELENS_WEIGHTS = "sae_weights.safetensors"
_CONFIG = "cfg.json"
_SCALER = "activation_scaler.json"
_WHITENING = "activation_whitening.safetensors"
_LAYOUT_VERSION = "6.54.12"
"""The SAELens release whose layout is written."""

_Shapes = dict[str, tuple[str, ...]]
_VECTOR: tuple[str, ...] = ("d_sae",)
_AUTOENCODER: _Shapes = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}
_TRANSCODER: _Shapes = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",)}
_SKIP: _Shapes = {"W_skip": ("d_out", "d_in")}


class _Architecture(NamedTuple):
    kind: type[SparseAutoencoder]
    tensors: _Shapes
    is_transcoder: bool = False


_ARCHITECTURES = {
    "standard": _Architecture(ReLUSAE, _AUTOENCODER | {"b_enc": _VECTOR}),
    "gated": _Architecture(GatedSAE, _AUTOENCODER | dict.fromkeys(("b_gate", "b_mag", "r_mag"), _VECTOR)),
    "topk": _Architecture(TopKSAE, _AUTOENCODER | {"b_enc": _VECTOR}),
    "jumprelu": _Architecture(JumpReLUSAE, _AUTOENCODER | {"b_enc": _VECTOR, "threshold": _VECTOR}),
    # Of unfinished training runs alone: there the threshold is one number.
    "batchtopk": _Architecture(BatchTopKSAE, _AUTOENCODER | {"b_enc": _VECTOR, "topk_threshold": ()}),
    "matryoshka_batchtopk": _Architecture(MatryoshkaSAE, _AUTOENCODER | {"b_enc": _VECTOR, "topk_threshold": ()}),
    "transcoder": _Architecture(ReLUSAE, _TRANSCODER | {"b_enc": _VECTOR}, True),
    "skip_transcoder": _Architecture(ReLUSAE, _TRANSCODER | _SKIP | {"b_enc": _VECTOR}, True),
    "jumprelu_transcoder": _Architecture(JumpReLUSAE, _TRANSCODER | {"b_enc": _VECTOR, "threshold": _VECTOR}, True),
    "jumprelu_skip_transcoder": _Architecture(
        JumpReLUSAE, _TRANSCODER | _SKIP | {"b_enc": _VECTOR, "threshold": _VECTOR}, True
    ),
}
"""What can be read: SAELens' name, our class, and the tensors with their shapes."""


def save_saelens(
    sae: SparseAutoencoder, directory: str | os.PathLike[str], *, model_name: str, hook_name: str, **metadata: Any
) -> pathlib.Path:
    """Writes an autoencoder or a transcoder.

    Args:
        sae: the autoencoder.
        directory: the folder to write to; it is made.
        model_name: the model that the activations are from.
        hook_name: the site, in whatever form the reader knows.
        **metadata: anything else to keep; JSON. With `hook_name_out`, the site that a transcoder predicts, one whose
            output is as wide as its input is written as a transcoder too.

    Returns:
        The folder.

    Raises:
        ValueError: for TopK codes with a skip, or with another width of output: SAELens has no name for them.
        TypeError: if the metadata is not JSON; nothing is written then.
        OSError: if a file cannot be written.
    """
    directory = pathlib.Path(directory)
    written, architecture = _written_form(sae, is_transcoder="hook_name_out" in metadata)
    arrays = stored_arrays(written)
    if isinstance(written, JumpReLUSAE):
        arrays.pop("log_threshold", None)
        arrays["threshold"] = np.asarray(written.thresholds())
    elif isinstance(written, BatchTopKSAE):
        arrays["threshold"] = np.asarray(written.threshold[...])
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(np.result_type(*(array.dtype for array in arrays.values()))),
        "device": "cpu",
        "apply_b_dec_to_input": written.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if _ARCHITECTURES[architecture].is_transcoder:
        config["d_out"] = sae.d_out
    if isinstance(sae, TopKSAE):
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    facts = {"model_name": model_name, "hook_name": hook_name, **_training_facts(sae), **metadata}
    # The version is that of the layout: by an older one, in metadata that was read, SAELens would misread the config.
    config["metadata"] = facts | {"sae_lens_version": _LAYOUT_VERSION}
    write_weights_and_config(directory / SAELENS_WEIGHTS, arrays, directory / _CONFIG, config)
    return directory


def _written_form(sae: SparseAutoencoder, *, is_transcoder: bool) -> tuple[SparseAutoencoder, str]:
    """The autoencoder in a form that SAELens has, and what it calls that."""
    has_skip = sae.W_skip is not None
    needs_transcoder = has_skip or sae.d_out != sae.d_in
    if isinstance(sae, TopKSAE):
        if needs_transcoder:
            raise ValueError(
                f"SAELens has no transcoder with TopK codes, and this one has d_in = {sae.d_in}, d_out = {sae.d_out} "
                f"and {'a' if has_skip else 'no'} skip. Where both widths are one, use the layout sparsify."
            )
        return sae, "topk"
    if not (needs_transcoder or is_transcoder):
        if isinstance(sae, ReLUSAE):
            return sae, "standard"
        return sae, "gated" if isinstance(sae, GatedSAE) else "jumprelu"
    sae = uncentred(sae)
    skip = "skip_" if has_skip else ""
    if isinstance(sae, ReLUSAE):
        return sae, f"{skip}transcoder"
    return as_jumprelu(sae), f"jumprelu_{skip}transcoder"


def _training_facts(sae: SparseAutoencoder) -> dict[str, Any]:
    """What SAELens keeps, under the same names, of an architecture that is saved as another one."""
    details: dict[str, Any]
    if isinstance(sae, MatryoshkaSAE):
        name, details = "matryoshka_batchtopk", {"k": sae.k, "matryoshka_widths": list(sae.widths)}
    elif isinstance(sae, BatchTopKSAE):
        name, details = "batchtopk", {"k": sae.k}
    elif isinstance(sae, JumpReLUSAE):
        name, details = "jumprelu", {"jumprelu_bandwidth": sae.bandwidth}
    else:
        return {}
    return {"training_architecture": name, "training_architecture_details": details}


def load_saelens(directory: str | os.PathLike[str], *, norm_scaling_factor: float | None = None) -> SparseAutoencoder:
    """Reads an autoencoder or a transcoder, for activations as the model gives them.

    Args:
        directory: a folder with `cfg.json` and `sae_weights.safetensors`.
        norm_scaling_factor: for a config with `normalize_activations: expected_average_only_in` alone, where the folder
            holds no `activation_scaler.json`: what activations were multiplied by in training.

    Returns:
        The autoencoder; one that SAELens saved as `jumprelu` is a `JumpReLUSAE`, whatever it was in training.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is cut short or altered, tensors are missing, unknown or misshapen, the architecture has
            no counterpart here, or an option cannot be folded into the weights.
    """
    config_path = pathlib.Path(directory) / _CONFIG
    weights_path = config_path.with_name(SAELENS_WEIGHTS)
    config = read_config(config_path)
    if not _is_since_6(config, config_path):
        config = _as_since_6(config, config_path)
    name = option(config, config_path, "architecture", str)
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"{config_path}: the architecture {name!r} cannot be read; those that can are {', '.join(_ARCHITECTURES)}."
        )
    architecture = _ARCHITECTURES[name]
    arrays = _checked_arrays(weights_path, config_path, config, architecture)
    check_checksum(weights_path, config_path, config)
    is_centred = _is_centred(config, config_path, architecture)
    _fold_finetuning(arrays, config, weights_path, config_path)
    is_rescaled = _is_rescaled(config, config_path, name)
    _fold_normalisation(arrays, config, config_path, architecture, is_centred, is_rescaled, norm_scaling_factor)
    options = _options(arrays, config, config_path, architecture)
    return build(directory, architecture.kind, arrays, apply_b_dec_to_input=is_centred, **options)


def _is_since_6(config: dict[str, Any], path: pathlib.Path) -> bool:
    """Whether a config is of the form that SAELens writes since 6.0, where metadata are apart."""
    metadata = option(config, path, "metadata", dict, {})
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if not version:
        return False
    try:
        return Version(str(version)) >= Version("6.0.0rc0")
    except InvalidVersion:
        raise ValueError(
            f"{path}: sae_lens_version is {version!r}, which is no version; expected one like 6.0.0."
        ) from None


def _as_since_6(config: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """An older config in today's form."""
    config = dict(config)
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    arguments = option(config, path, "activation_fn_kwargs", dict, {})
    if activation not in ("relu", "topk"):
        raise ValueError(f"{path}: the activation function {activation!r} cannot be read; expected 'relu' or 'topk'.")
    if activation == "topk":
        config["architecture"] = "topk"
    config.setdefault("architecture", "standard")
    if "k" in arguments:
        config["k"] = arguments["k"]
    normalisation = config.get("normalize_activations")
    if isinstance(normalisation, bool):
        config["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    return config


def _checked_arrays(
    weights_path: pathlib.Path, config_path: pathlib.Path, config: dict[str, Any], architecture: _Architecture
) -> dict[str, np.ndarray]:
    arrays = read_safetensors(weights_path)
    drop_unit_scaling(arrays)
    expected = dict(architecture.tensors)
    if "threshold" in expected and "log_threshold" in arrays:
        expected["log_threshold"] = expected.pop("threshold")
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in arrays:
            expected[name] = _VECTOR
    names = ("d_in", "d_sae", "d_out") if architecture.is_transcoder else ("d_in", "d_sae")
    sizes = {name: option(config, config_path, name, int) for name in names if config.get(name) is not None}
    check_tensors(weights_path, arrays, expected, sizes)
    if "log_threshold" in arrays:
        arrays["threshold"] = np.exp(arrays.pop("log_threshold"))
    return arrays


def _is_centred(config: dict[str, Any], path: pathlib.Path, architecture: _Architecture) -> bool:
    is_centred = option(config, path, "apply_b_dec_to_input", bool, not architecture.is_transcoder)
    if is_centred and architecture.is_transcoder:
        raise ValueError(
            f"{path}: apply_b_dec_to_input is true, which SAELens refuses for transcoders. If the weights are from "
            "SAELens, set it to false."
        )
    reshaping = option(config, path, "reshape_activations", str, "none")
    if reshaping not in ("none", "hook_z"):
        raise ValueError(f"{path}: reshape_activations is {reshaping!r}; only 'none' and 'hook_z' can be read.")
    return is_centred


def _is_rescaled(config: dict[str, Any], path: pathlib.Path, name: str) -> bool:
    if name not in ("topk", "batchtopk", "matryoshka_batchtopk"):
        return False
    # SAELens' default; another one in training than outside.
    return option(config, path, "rescale_acts_by_decoder_norm", bool, name != "topk")


def _fold_finetuning(
    arrays: dict[str, np.ndarray], config: dict[str, Any], weights_path: pathlib.Path, config_path: pathlib.Path
) -> None:
    """Codes that are multiplied before they are decoded: dictionary rows that are."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name not in arrays:
            continue
        if config.get("finetuning_scaling_factor") is not True:
            raise ValueError(
                f"{weights_path} holds {name} that is not all ones, but finetuning_scaling_factor in {config_path} is "
                "not true: whether it is to be applied is unknown. Set it to true, or remove the tensor."
            )
        arrays["W_dec"] = arrays["W_dec"] * arrays.pop(name)[:, None]


def _fold_normalisation(
    arrays: dict[str, np.ndarray],
    config: dict[str, Any],
    path: pathlib.Path,
    architecture: _Architecture,
    is_centred: bool,
    is_rescaled: bool,
    norm_scaling_factor: float | None,
) -> None:
    """Makes weights for normalised activations into weights for those that the model gives."""
    normalisation = option(config, path, "normalize_activations", str, "none")
    if norm_scaling_factor is not None and normalisation != "expected_average_only_in":
        raise ValueError(
            f"{path}: normalize_activations is {normalisation!r}, so that norm_scaling_factor = {norm_scaling_factor} "
            "would scale twice. Leave it out."
        )
    if normalisation == "none":
        if is_rescaled:
            _fold_decoder_norms(arrays)
        return
    if normalisation not in ("expected_average_only_in", "covariance_whitening") or architecture.is_transcoder:
        raise ValueError(
            f"{path}: normalize_activations is {normalisation!r}"
            f"{' in a transcoder' if architecture.is_transcoder else ''}, which cannot be folded into the weights. "
            "Only 'none' can be read, and in autoencoders 'expected_average_only_in' and 'covariance_whitening'. To "
            "use these weights, set it to 'none' and normalise the activations yourself."
        )
    if normalisation == "covariance_whitening":
        # Whitening changes the rows' norms: those that codes are rescaled by are the ones before it.
        if is_rescaled:
            _fold_decoder_norms(arrays)
        _fold_whitening(arrays, path, is_centred)
        return
    scale = _scale(path) if norm_scaling_factor is None else norm_scaling_factor
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"{path}: activations are scaled by {scale}; expected a positive number.")
    # Codes stay the same: relu((s x - b_dec) W_enc + b_enc) = relu((x - b_dec / s) (s W_enc) + b_enc).
    arrays["W_enc"] = arrays["W_enc"] * scale
    arrays["W_dec"], arrays["b_dec"] = arrays["W_dec"] / scale, arrays["b_dec"] / scale
    if is_rescaled:
        # ... but for codes in units of the rows, which have just become s times shorter.
        _fold_decoder_norms(arrays)
        if "topk_threshold" in arrays:
            arrays["topk_threshold"] = arrays["topk_threshold"] / scale


def _scale(config_path: pathlib.Path) -> float:
    """What a training run in this folder multiplies activations by."""
    path = config_path.with_name(_SCALER)
    held = read_config(path) if path.is_file() else {}
    if held.get("scaling_factor") is None:
        raise ValueError(
            f"{config_path}: normalize_activations is 'expected_average_only_in', but {path} holds no scaling_factor. "
            "Pass load_saelens the norm_scaling_factor that activations were multiplied by in training (SAELens lists "
            "those of its releases), or 1.0 if you scale them yourself."
        )
    return option(held, path, "scaling_factor", float)


def _fold_decoder_norms(arrays: dict[str, np.ndarray]) -> None:
    """Codes that are multiplied by their rows' norms, and divided before they are decoded: rows of norm one."""
    norms = np.linalg.norm(arrays["W_dec"].astype(np.float64), axis=1)
    arrays["W_enc"], arrays["b_enc"] = arrays["W_enc"] * norms, arrays["b_enc"] * norms
    # A zero row has a code of zero; dividing by its norm would make it NaN.
    arrays["W_dec"] = arrays["W_dec"] / np.where(norms > 0, norms, 1)[:, None]


def _fold_whitening(arrays: dict[str, np.ndarray], config_path: pathlib.Path, is_centred: bool) -> None:
    """Weights for `(x - mean) @ matrix`, whose output goes back by the inverse."""
    path = config_path.with_name(_WHITENING)
    if not path.is_file():
        raise ValueError(
            f"{config_path}: normalize_activations is 'covariance_whitening', but {path} is not there. Fetch it, or "
            "set normalize_activations to 'none' and whiten the activations yourself."
        )
    whitening = read_safetensors(path)
    square = ("d_in", "d_in")
    expected = {"mean": ("d_in",), "matrix": square, "inverse_matrix": square}
    check_tensors(path, whitening, expected, {"d_in": arrays["W_enc"].shape[0]})
    mean, matrix, inverse = (whitening[name].astype(np.float64) for name in ("mean", "matrix", "inverse_matrix"))
    arrays["W_enc"] = matrix @ arrays["W_enc"]
    arrays["W_dec"] = arrays["W_dec"] @ inverse
    arrays["b_dec"] = arrays["b_dec"] @ inverse + mean
    # With b_dec subtracted from the input the mean is subtracted by it.
    shift = 0.0 if is_centred else mean @ arrays["W_enc"]
    for name, scale in {"b_enc": 1.0, "b_gate": 1.0, "b_mag": np.exp(arrays.get("r_mag", 0.0))}.items():
        if name in arrays:
            arrays[name] = arrays[name] - shift * scale


def _options(
    arrays: dict[str, np.ndarray], config: dict[str, Any], path: pathlib.Path, architecture: _Architecture
) -> dict[str, Any]:
    """What is not an array; a threshold that is one number becomes one a latent."""
    d_sae = arrays["W_enc"].shape[1]
    if "topk_threshold" in arrays:
        arrays["threshold"] = np.full(d_sae, arrays.pop("topk_threshold"))
    options: dict[str, Any] = {}
    if issubclass(architecture.kind, (TopKSAE, BatchTopKSAE)):
        options["k"] = option(config, path, "k", int)
    if architecture.kind is MatryoshkaSAE:
        widths = option(config, path, "matryoshka_widths", list)
        if not all(isinstance(width, int) for width in widths):
            raise ValueError(f"{path}: matryoshka_widths is {widths!r}; expected rising whole numbers.")
        # SAELens adds the full width where it is not given.
        options["widths"] = (*widths, d_sae) if widths and widths[-1] != d_sae else tuple(widths)
    if architecture.kind is JumpReLUSAE:
        metadata = option(config, path, "metadata", dict, {})
        details = option(metadata, path, "training_architecture_details", dict, {})
        bandwidth = config.get("jumprelu_bandwidth", details.get("jumprelu_bandwidth"))
        # It is of use in training alone, so that an odd one is no reason to refuse the weights.
        if isinstance(bandwidth, float) and bandwidth > 0:
            options["bandwidth"] = bandwidth
    return options
