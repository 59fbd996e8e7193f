"""What cannot be applied exactly is refused, with the key or field in the message; nothing is left out in silence."""

import ml_dtypes
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from server.adapters.pack import write_pack
from server.errors import AdapterRefused
from tests.server.adapters.layouts import HIDDEN, VOCAB, describe, gemma, gpt2, llama, phi, rewrite_config, tied_llama, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

Q = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm"


@pytest.fixture
def folder(tmp_path):
    return train(llama(), tmp_path / "adapter")


def change(folder, add=None, drop=()):
    path = folder / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if key not in drop}
    save_file({**tensors, **(add or {})}, path)


def refusal(folder, layout=None, **config):
    if config:
        rewrite_config(folder, **config)
    with pytest.raises(AdapterRefused) as refused:
        write_pack(folder, layout or describe(llama()), "h", folder.parent / "pack")
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_file()) == []  # nothing half-written either
    assert str(folder) not in refused.value.message
    return refused.value.message


def zeros(*shape):
    return np.zeros(shape, np.float32)


def test_wrong_base_is_refused_with_the_nearest_names(folder):
    message = refusal(folder, describe(gpt2()))
    assert "layers.0.self_attn.q_proj" in message and "has no module" in message
    change(folder, add={"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": zeros(4, HIDDEN)})
    assert "nearest: 'model.layers.0.self_attn.q_proj'" in refusal(folder)


def test_other_shapes_are_refused_by_key(folder):
    assert "lora_A.weight' has shape [4, 48], not [4, 32]" in refusal(_with(folder, {f"{Q}.lora_A.weight": zeros(4, 48)}))
    assert "lora_B.weight' has shape [16, 4], not [32, 4]" in refusal(
        _with(folder, {f"{Q}.lora_A.weight": zeros(4, 32), f"{Q}.lora_B.weight": zeros(16, 4)})
    )


def _with(folder, tensors):
    change(folder, add=tensors)
    return folder


def test_rank_that_the_config_does_not_say_is_refused(folder):
    assert "not [8, 32]" in refusal(folder, r=8)
    assert "not [2, 32]" in refusal(folder, r=4, rank_pattern={"layers.0.*": 2})


def test_missing_tensor_is_refused(folder):
    change(folder, drop=[f"{Q}.lora_B.weight"])
    assert "'model.layers.0.self_attn.q_proj (b)'" in refusal(folder)


def test_targeted_module_without_tensors_is_refused(folder):
    message = refusal(folder, target_modules=["q_proj", "v_proj"])
    assert "model.layers.0.self_attn.v_proj" in message and "more" in message


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (f"{Q}.lora_magnitude_vector", (32,)),
        (f"{Q}.lora_B.bias", (32,)),
        (f"{Q}.lora_embedding_A", (4, 32)),
        (f"{Q}.base_layer.weight", (32, 32)),
        (f"{Q}.base_layer.bias", (32,)),
        (f"{Q}.weight", (32, 32)),
        (f"{Q}.lora_diag", (4,)),
        (f"{Q}.lora_A.other.weight", (4, 32)),
        (f"{Q.replace('q_proj', 'k_proj')}.lora_A.weight", (4, 32)),
        (f"{Q.replace('q_proj', 'k_proj')}.bias", (16,)),
        (f"{NORM}.weight", (32,)),
        (f"{NORM}.gain", (32,)),
        (f"{NORM}.modules_to_save.weight", (32,)),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 32)),
        ("base_model.model.model.embed_tokens.base_layer.weight", (64, 32)),
        ("base_model.model.lm_head.weight", (63, 32)),
        ("base_model.model.lm_head.weight", (64,)),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (4, 32)),
        ("base_model.model.score.weight", (2, 32)),
        ("lora_A.weight", (4, 32)),
        ("base_model.model.weight", (4, 32)),
    ],
)
def test_tensor_that_nothing_explains_is_refused_by_key(folder, key, shape):
    change(folder, add={key: zeros(*shape)})
    assert key in refusal(folder)


def test_two_tensors_for_one_thing_are_refused(folder):
    change(folder, add={f"{Q}.lora_A.default.weight": zeros(4, 32)})
    assert f"{Q}.lora_A.weight" in refusal(folder)


def test_keys_with_the_adapters_name_are_taken_as_peft_takes_them(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    write_pack(folder, describe(llama()), "h", folder.parent / "one")
    save_file({key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    write_pack(folder, describe(llama()), "h", folder.parent / "two")
    assert (folder.parent / "one").read_bytes() == (folder.parent / "two").read_bytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("pack_dtype", ["float32", "bfloat16", "float16"])
def test_numbers_that_are_not_finite_are_refused(folder, value, dtype, pack_dtype):
    b = zeros(32, 4)
    b[3, 1] = value
    change(folder, add={f"{Q}.lora_B.weight": b.astype(dtype)})
    assert "lora_B.weight' has NaN or infinity" in refusal(folder, describe(llama(), pack_dtype))


def test_numbers_beyond_the_packs_range_are_refused(folder):
    change(folder, add={f"{Q}.lora_B.weight": np.full((32, 4), 1e6, np.float32)})
    assert "beyond the range of float16" in refusal(folder, describe(llama(), "float16"))
    write_pack(folder, describe(llama(), "bfloat16"), "h", folder.parent / "pack")


def test_folded_factor_that_is_not_finite_is_refused_by_its_own_key(tmp_path):
    folder = train(llama(), tmp_path / "adapter", target_modules=["lm_head"])
    change(folder, add={"base_model.model.lm_head.lora_A.weight": np.full((4, 32), np.nan, np.float32)})
    assert "lm_head.lora_A.weight" in refusal(folder, describe(llama(), hashes=False))


@pytest.mark.parametrize(
    ("base", "config", "field"),
    [
        (llama, {"target_modules": ["embed_tokens"], "use_dora": True}, "use_dora"),
        (phi, {"target_modules": ["fc1"], "trainable_token_indices": {"lm_head": [1]}}, "trainable_token_indices"),
    ],
)
def test_what_has_no_exact_meaning_is_refused_by_field(base, config, field, tmp_path):
    folder = train(base(), tmp_path / "adapter", **config)
    assert field in refusal(folder, describe(base()))


def test_tokens_of_a_module_with_a_delta_are_refused(tmp_path):
    """PEFT can make no such adapter; a config that says so was changed by hand."""
    folder = train(tied_llama(), tmp_path / "adapter", target_modules=["lm_head"])
    assert "trainable_token_indices: 'lm_head'" in refusal(folder, describe(tied_llama()), trainable_token_indices=[1])


def test_layer_that_lora_cannot_be_on_is_refused(folder):
    assert "'model.layers.0.mlp' (class LlamaMLP)" in refusal(folder, target_modules=["q_proj", "mlp"])


def test_module_that_cannot_be_replaced_is_refused(tmp_path):
    folder = train(gpt2(), tmp_path / "adapter", target_modules=["c_attn"], modules_to_save=["wpe"])
    message = refusal(folder, describe(gpt2()))
    assert "transformer.wpe.weight" in message and "class Embedding" in message


def test_saved_module_without_its_tensor_is_refused(tmp_path):
    folder = train(phi(), tmp_path / "adapter", target_modules=["fc1"], modules_to_save=["k_proj"])
    change(folder, drop=["base_model.model.model.layers.1.self_attn.k_proj.bias"])
    assert "modules_to_save" in refusal(folder, describe(phi())) and "layers.1.self_attn.k_proj.bias" in refusal(folder, describe(phi()))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_bias_that_is_missing_is_refused(bias, tmp_path):
    folder = train(phi(), tmp_path / "adapter", target_modules=["fc1"], bias=bias)
    change(folder, drop=["base_model.model.model.layers.1.mlp.fc1.base_layer.bias"])
    assert "bias is" in refusal(folder, describe(phi())) and "layers.1.mlp.fc1.bias" in refusal(folder, describe(phi()))


def test_embedding_that_grew_without_its_head_is_refused(tmp_path):
    folder = train(llama(), tmp_path / "adapter", resize=VOCAB + 6)
    change(folder, drop=["base_model.model.lm_head.weight"])
    assert "grew by 6 rows in 'model.embed_tokens' and by 0 in 'lm_head'" in refusal(folder)


def test_bias_of_a_head_must_grow_with_it(tmp_path):
    folder = train(phi(), tmp_path / "adapter", target_modules=["fc1"], resize=VOCAB + 6)
    change(folder, drop=["base_model.model.lm_head.bias"])
    assert "'lm_head.bias' must have as many rows as 'lm_head.weight'" in refusal(folder, describe(phi()))
    other = train(phi(), tmp_path / "bias" / "adapter", target_modules=["fc1"])
    change(other, add={"base_model.model.lm_head.bias": zeros(VOCAB + 6)})
    assert "lm_head.bias" in refusal(other, describe(phi()))


def test_tied_weights_that_differ_are_refused(tmp_path):
    folder = train(tied_llama(), tmp_path / "adapter", resize=VOCAB + 6)
    change(folder, add={"base_model.model.lm_head.weight": zeros(VOCAB + 6, HIDDEN)})
    assert "one tied weight" in refusal(folder, describe(tied_llama()))


@pytest.mark.parametrize("config", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_tying_that_the_file_contradicts_is_refused(config, tmp_path):
    folder = train(tied_llama(), tmp_path / "adapter", ensure_weight_tying=True, **config)
    saved = "modules_to_save" in config
    change(folder, add={f"base_model.model.lm_head.{'weight' if saved else 'lora_B.weight'}": zeros(VOCAB, HIDDEN if saved else 4)})
    assert "ensure_weight_tying" in refusal(folder, describe(tied_llama()))


def test_tied_delta_without_its_source_is_refused(tmp_path):
    folder = train(tied_llama(), tmp_path / "adapter", ensure_weight_tying=True, target_modules=["embed_tokens"])
    keys = [key for key in load_file(folder / "adapter_model.safetensors") if "embed_tokens" in key]
    change(folder, drop=keys)
    assert "ensure_weight_tying" in refusal(folder, describe(tied_llama()), exclude_modules=["embed_tokens"])


@pytest.mark.parametrize("ids", [[1, 1], [1, VOCAB]])
def test_token_ids_that_cannot_be_are_refused(ids, tmp_path):
    folder = train(llama(), tmp_path / "adapter", trainable_token_indices=[1, 2])
    assert "trainable_token_indices" in refusal(folder, trainable_token_indices=ids)


def test_adapter_that_changes_nothing_is_refused(folder):
    change(folder, add={"x": zeros(1)})
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "changes nothing" in refusal(folder, target_modules="dummy-target-modules")


def test_scaled_embedding_is_no_special_case(tmp_path):
    """A pack's embedding is in the weight's space; the engine multiplies by Gemma's scale, so DoRA there stays refused like elsewhere."""
    folder = train(gemma(), tmp_path / "adapter", target_modules=["embed_tokens"], use_dora=True)
    assert "use_dora" in refusal(folder, describe(gemma()))


def test_names_from_the_file_are_cut_and_escaped(folder):
    change(folder, add={f"base_model.model.{'x' * 5000}\n\x1b.weight": zeros(1)})
    message = refusal(folder)
    assert len(message) < 600 and "\n" not in message and "\x1b" not in message


def test_field_of_a_newer_peft_is_refused_by_name(folder):
    assert peft.__version__ and "'use_next'" in refusal(folder, use_next={"alpha": 2})
