"""What SAELens 6.54.12 and sparsify 1.3.3 save, and compute with it: written once, compared ever after.

Each needs an environment of its own, `.venv-saelens` and `.venv-sparsify` (`pip install sae-lens==6.54.12`,
`eai-sparsify==1.3.3`, PyTorch for the CPU):

    .venv-saelens/bin/python tests/sae/peers_reference.py make saelens
    .venv-sparsify/bin/python tests/sae/peers_reference.py make sparsify

write the tool's own folders of small random autoencoders to `data/`, with `expected.npz`: inputs, codes and outputs. So
reading them is tested in every CI run, without PyTorch. The other direction, `check TOOL FOLDER`, is run by the tests
where the environment is there: every folder in it, in our hand, is loaded by the tool and its codes and outputs for
`FOLDER/x.npz` go to `FOLDER/computed.npz`.

Gemma Scope's files are read by SAELens' own loaders, given a local folder instead of a download.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys

import numpy as np

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # or sparsify takes its GPU kernels wherever Triton is installed

DATA = pathlib.Path(__file__).parent / "data"
D_IN, D_SAE, D_OUT, ROWS = 8, 32, 6, 9
MODEL, SITE = "tiny", "blocks.2.hook_resid_post"


def inputs():
    return np.random.default_rng(3).normal(size=(ROWS, D_IN)).astype(np.float32)


# SAELens


def randomised(sae, seed):
    """Random in every parameter, thresholds positive, on a scale where some codes are zero and some are not."""
    import torch

    rng = np.random.default_rng(seed)
    for name, parameter in sae.named_parameters():
        values = rng.normal(size=tuple(parameter.shape)) * (0.4 if name.startswith(("W_", "r_")) else 0.3)
        if name == "threshold":
            values = np.abs(values) + 0.2
        parameter.data = torch.tensor(values, dtype=parameter.dtype)
    return sae


def saelens_cases(folder):
    """Yields each case with what SAELens computes by it; the folder is written by then."""
    import sae_lens as sl
    import torch
    from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
    from safetensors.torch import load_file, save_file

    def sizes(**more):
        facts = SAEMetadata(model_name=MODEL, hook_name=more.pop("hook_name", SITE))
        return {"d_in": D_IN, "d_sae": D_SAE, "metadata": facts, **more}

    transcoder = {"d_out": D_OUT, "apply_b_dec_to_input": False}
    kinds = {
        "standard": (sl.StandardSAE, sl.StandardSAEConfig, {}),
        "standard_uncentred": (sl.StandardSAE, sl.StandardSAEConfig, {"apply_b_dec_to_input": False}),
        "gated": (sl.GatedSAE, sl.GatedSAEConfig, {}),
        "topk": (sl.TopKSAE, sl.TopKSAEConfig, {"k": 4}),
        "topk_rescaled": (sl.TopKSAE, sl.TopKSAEConfig, {"k": 4, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": (sl.JumpReLUSAE, sl.JumpReLUSAEConfig, {}),
        "jumprelu_bfloat16": (sl.JumpReLUSAE, sl.JumpReLUSAEConfig, {"dtype": "bfloat16"}),
        "topk_float16": (sl.TopKSAE, sl.TopKSAEConfig, {"k": 4, "dtype": "torch.float16"}),
        "transcoder": (sl.Transcoder, sl.TranscoderConfig, transcoder),
        "skip_transcoder": (sl.SkipTranscoder, sl.SkipTranscoderConfig, transcoder),
        "jumprelu_transcoder": (sl.JumpReLUTranscoder, sl.JumpReLUTranscoderConfig, transcoder),
        "jumprelu_skip_transcoder": (sl.JumpReLUSkipTranscoder, sl.JumpReLUSkipTranscoderConfig, transcoder),
        # A trained one, as the end of SAELens' training saves it, and as it is saved in the middle.
        "standard_trained": (sl.StandardTrainingSAE, sl.StandardTrainingSAEConfig, {}),
        "gated_trained": (sl.GatedTrainingSAE, sl.GatedTrainingSAEConfig, {}),
        "jumprelu_trained": (sl.JumpReLUTrainingSAE, sl.JumpReLUTrainingSAEConfig, {}),
        "topk_trained": (sl.TopKTrainingSAE, sl.TopKTrainingSAEConfig, {"k": 4}),
        "batchtopk_trained": (sl.BatchTopKTrainingSAE, sl.BatchTopKTrainingSAEConfig, {"k": 4}),
        "matryoshka_trained": (
            sl.MatryoshkaBatchTopKTrainingSAE, sl.MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": 4, "matryoshka_widths": [8, 16, D_SAE]},
        ),
        "batchtopk_checkpoint": (sl.BatchTopKTrainingSAE, sl.BatchTopKTrainingSAEConfig, {"k": 4}),
        "matryoshka_checkpoint": (
            sl.MatryoshkaBatchTopKTrainingSAE, sl.MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": 4, "matryoshka_widths": [8, D_SAE]},
        ),
        "topk_checkpoint": (sl.TopKTrainingSAE, sl.TopKTrainingSAEConfig, {"k": 4}),
        "gated_checkpoint": (sl.GatedTrainingSAE, sl.GatedTrainingSAEConfig, {}),
        "jumprelu_checkpoint": (
            sl.JumpReLUTrainingSAE, sl.JumpReLUTrainingSAEConfig, {"jumprelu_bandwidth": 0.25},
        ),
    }  # fmt: skip
    for seed, (case, (cls, config, options)) in enumerate(kinds.items()):
        sae = randomised(cls(config(**sizes(**options))), seed)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.35)
        if case.endswith("_trained"):
            sae.save_inference_model(folder / case)
            sae = SAE.load_from_disk(folder / case)
        else:
            sae.save_model(folder / case)
        if "topk_checkpoint" in case or case == "matryoshka_checkpoint":
            # In training these pick among a whole batch, or have codes in other units than outside.
            sae.save_inference_model(folder / ".inference")
            sae = SAE.load_from_disk(folder / ".inference")
            shutil.rmtree(folder / ".inference")
        yield case, sae.to(torch.float32)

    # Older forms.
    sae = randomised(sl.JumpReLUTrainingSAE(sl.JumpReLUTrainingSAEConfig(**sizes())), 30)
    sae.save_model(folder / "log_threshold")
    weights = load_file(folder / "log_threshold" / "sae_weights.safetensors")
    weights["log_threshold"] = weights.pop("threshold").log()
    save_file(weights, folder / "log_threshold" / "sae_weights.safetensors")
    yield "log_threshold", TrainingSAE.load_from_disk(folder / "log_threshold")

    old = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu", "model_name": MODEL,
        "hook_name": SITE, "hook_layer": 2, "hook_head_index": None, "prepend_bos": True, "dataset_path": "text",
        "context_size": 128, "normalize_activations": "none", "dataset_trust_remote_code": True,
        "sae_lens_training_version": None,
    }  # fmt: skip
    forms = {
        "before_6_standard": {
            "architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {},
            "apply_b_dec_to_input": False, "finetuning_scaling_factor": False, "sae_lens_training_version": "5.4.0",
        },
        "before_6_topk": {
            "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4},
            "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        },
        "before_6_gated": {"architecture": "gated", "activation_fn": "relu", "finetuning_scaling_factor": False},
        "before_6_jumprelu": {"architecture": "jumprelu", "activation_fn_str": "relu", "apply_b_dec_to_input": False},
        "before_6_bare": {"normalize_activations": False, "hook_point": SITE},
    }  # fmt: skip
    bases = {"topk": "standard", "gated": "gated", "jumprelu": "jumprelu"}
    for seed, (case, fields) in enumerate(forms.items()):
        base = bases.get(case.removeprefix("before_6_"), "standard")
        cls, config, options = kinds[base]
        state = dict(randomised(cls(config(**sizes(**options))), 40 + seed).state_dict())
        if case == "before_6_standard":
            state["scaling_factor"] = torch.ones(D_SAE)
        (folder / case).mkdir()
        save_file(state, folder / case / "sae_weights.safetensors")
        (folder / case / "cfg.json").write_text(json.dumps(old | fields))
        yield case, SAE.load_from_disk(folder / case)

    # Unfinished runs on normalised activations: the scale or the whitening lies beside the weights.
    rng = np.random.default_rng(60)
    matrix = rng.normal(size=(D_IN, D_IN)) / 3 + np.eye(D_IN)
    whitening = ActivationWhitening(
        *(torch.tensor(array) for array in (rng.normal(size=D_IN), matrix, np.linalg.inv(matrix)))
    )
    for seed, case in enumerate(("standard", "standard_uncentred", "gated", "topk_rescaled", "jumprelu")):
        for name in ("expected_average_only_in", "covariance_whitening"):
            cls, config, options = kinds[case]
            sae = randomised(cls(config(**sizes(**options), normalize_activations=name)), 50 + seed)
            place = folder / f"{case}_{name}"
            sae.save_model(place)
            if name == "covariance_whitening":
                ActivationScaler(whitening=whitening).save(str(place / "activation_scaler.json"))
                sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
            else:
                ActivationScaler(scaling_factor=1.7).save(str(place / "activation_scaler.json"))
                sae.fold_activation_norm_scaling_factor(1.7)
            yield place.name, sae

    # Attention heads side by side: weights are the same, the input has one more axis.
    heads = {"reshape_activations": "hook_z", "hook_name": "blocks.0.attn.hook_z"}
    sae = randomised(sl.StandardSAE(sl.StandardSAEConfig(**sizes(**heads))), 70)
    sae.save_model(folder / "hook_z")
    sae.turn_off_forward_pass_hook_z_reshaping()
    yield "hook_z", sae

    rng = np.random.default_rng(80)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    arrays = {name: (0.4 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    arrays["threshold"] = np.abs(rng.normal(size=D_SAE)).astype(np.float32)
    (folder / "gemma_scope").mkdir()
    np.savez(folder / "gemma_scope" / "params.npz", **arrays)
    yield "gemma_scope", gemma_scope_by_saelens(folder / "gemma_scope")
    for case, affine in (("gemma_scope_2", False), ("gemma_scope_2_transcoder", True)):
        state = {name.lower(): torch.tensor(array) for name, array in arrays.items()}
        if affine:
            state["affine_skip_connection"] = torch.tensor(rng.normal(size=(D_IN, D_IN)).astype(np.float32))
        (folder / case).mkdir()
        save_file(state, folder / case / "params.safetensors")
        fields = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "affine_connection": affine}
        (folder / case / "config.json").write_text(json.dumps(fields))
        yield case, gemma_scope_2_by_saelens(folder / case, affine)


def gemma_scope_by_saelens(folder):
    """SAELens' loader of Gemma Scope, which takes sizes from the names of Google's repositories."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    with local(loaders, folder):
        overrides = {"d_in": D_IN, "d_sae": D_SAE}
        return saelens_of(*loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", "layer_0/width_16k", cfg_overrides=overrides
        )[:2])  # fmt: skip


def gemma_scope_2_by_saelens(folder, is_transcoder):
    from sae_lens.loading import pretrained_sae_loaders as loaders

    name = "transcoder/layer_5" if is_transcoder else "resid_post/layer_5"
    with local(loaders, folder):
        return saelens_of(*loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-270m-pt", name)[:2])


@contextlib.contextmanager
def local(loaders, folder):
    """Files of a folder where SAELens would download them."""
    from safetensors import safe_open

    def found(repo_id=None, filename="", **_):
        return str(folder / filename.rsplit("/", 1)[-1])

    def shapes(repo_id, filename):
        with safe_open(found(repo_id, filename), framework="numpy") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    kept = loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes
    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = found, shapes
    try:
        yield
    finally:
        loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = kept


def saelens_of(config, state):
    """The last part of SAELens' `from_pretrained`."""
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
    from sae_lens.registry import get_sae_class

    config = handle_config_defaulting(config)
    cls, config_cls = get_sae_class(config["architecture"])
    sae = cls(config_cls.from_dict(config))
    sae.load_state_dict(state)
    return sae


def saelens_computes(sae, x):
    import torch

    with torch.no_grad():
        x = torch.tensor(x)
        return sae.encode(x).numpy(), sae(x).numpy()


def saelens_loads(folder):
    from sae_lens.saes.sae import SAE

    if (folder / "params.npz").exists():
        return gemma_scope_by_saelens(folder)
    if (folder / "params.safetensors").exists():
        return gemma_scope_2_by_saelens(folder, json.loads((folder / "config.json").read_text())["affine_connection"])
    sae = SAE.load_from_disk(folder)
    assert sae.cfg.metadata.model_name == "tiny", sae.cfg
    # What SAELens writes of it again, which ours must read too.
    sae.save_model(folder / "again")
    return sae


# sparsify


def sparsify_cases(folder):
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    cases = {
        "topk": {"num_latents": D_SAE, "k": 4},
        "expansion": {"expansion_factor": 4, "k": 4, "normalize_decoder": False},
        "transcoder": {"num_latents": D_SAE, "k": 4, "transcode": True},
        "skip_transcoder": {"num_latents": D_SAE, "k": 4, "transcode": True, "skip_connection": True},
        "skip": {"num_latents": D_SAE, "k": 4, "skip_connection": True},
        "bfloat16": {"num_latents": D_SAE, "k": 4},
    }
    for seed, (case, options) in enumerate(cases.items()):
        dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
        sae = SparseCoder(D_IN, SparseCoderConfig(**options), dtype=dtype)
        rng = np.random.default_rng(seed)
        for parameter in sae.parameters():
            parameter.data = torch.tensor(0.4 * rng.normal(size=tuple(parameter.shape)), dtype=dtype)
        sae.save_to_disk(folder / case)
        yield case, SparseCoder.load_from_disk(folder / case).float()


def sparsify_computes(sae, x):
    import torch

    with torch.no_grad():
        result = sae(torch.tensor(x))
        codes = torch.zeros(len(x), sae.num_latents).scatter_(1, result.latent_indices, result.latent_acts)
        return codes.numpy(), result.sae_out.numpy()


def sparsify_loads(folder):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    sae.save_to_disk(folder / "again")
    return sae


TOOLS = {
    "saelens": (saelens_cases, saelens_computes, saelens_loads),
    "sparsify": (sparsify_cases, sparsify_computes, sparsify_loads),
}


def make(tool):
    cases, computes, _ = TOOLS[tool]
    folder, x = DATA / tool, inputs()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    expected = {"x": x}
    for case, sae in cases(folder):
        codes, output = computes(sae, x)
        assert 0 < np.mean(codes > 0) < 1, case
        expected |= {f"{case}/codes": codes, f"{case}/output": output}
        print(f"{case}: {np.mean(codes > 0):.0%} of the codes are active")
    np.savez_compressed(folder / "expected.npz", **expected)


def check(tool, folder):
    _, computes, loads = TOOLS[tool]
    folder = pathlib.Path(folder)
    x = np.load(folder / "x.npz", allow_pickle=False)["x"]
    computed = {}
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        codes, output = computes(loads(case), x)
        computed |= {f"{case.name}/codes": codes, f"{case.name}/output": output}
    np.savez(folder / "computed.npz", **computed)


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](*sys.argv[2:])
