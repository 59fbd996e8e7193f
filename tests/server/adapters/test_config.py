"""Every field of PEFT's LoraConfig has an entry, and each entry does what it says."""

import dataclasses

import peft
import pytest

from server.adapters.config import FIELDS, LoraConfig, parse_config, read_config
from server.adapters.pack import write_pack
from server.errors import AdapterRefused
from tests.server.adapters.layouts import describe, llama, rewrite_config, tied_llama, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

PLAIN = {"peft_type": "LORA", "target_modules": ["q_proj"]}
OF_KIND = {kind: sorted(name for name, field in FIELDS.items() if field.kind == kind) for kind in ("applied", "inert", "refused")}
REFUSED = {
    "peft_type": "IA3",
    "init_lora_weights": "pissa",
    "megatron_config": {"tensor_parallel": 2},
    "layer_replication": [[0, 1], [0, 2]],
    "target_parameters": ["experts.gate_up_proj"],
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 4},
    "kasa_config": {"beta": 0.1},
    "monteclora_config": {"num_samples": 8},
}
# How an adapter that PEFT saves differs when the field does. `base`: what both of them have.
APPLIED = {
    "r": ({}, 8),
    "target_modules": ({}, ["v_proj"]),
    "exclude_modules": ({}, ".*layers.0.*"),
    "lora_alpha": ({}, 3),
    "bias": ({}, "lora_only"),
    "use_rslora": ({}, True),
    "modules_to_save": ({}, ["norm"]),
    "layers_to_transform": ({}, [1]),
    "layers_pattern": ({"layers_to_transform": [1], "exclude_modules": ["k_proj"], "target_modules": ["q_proj", "lm_head"]}, "layers"),
    "rank_pattern": ({}, {"layers.1.self_attn.q_proj": 2}),
    "alpha_pattern": ({}, {"q_proj": 3}),
    "trainable_token_indices": ({}, [3]),
    "use_dora": ({}, True),
    "lora_bias": ({}, True),
    "ensure_weight_tying": ({"target_modules": ["embed_tokens"]}, True),
}
INERT = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "X"},
    "peft_version": "0.1",
    "base_model_name_or_path": "org/other",
    "revision": "abc",
    "inference_mode": False,
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 8,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"scale": "stable"},
}


def test_every_field_of_peft_has_an_entry_and_no_entry_is_made_up():
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == FIELDS.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} == set(OF_KIND["applied"])
    assert set(REFUSED) == set(OF_KIND["refused"]) and set(APPLIED) == set(OF_KIND["applied"]) and set(INERT) == set(OF_KIND["inert"])


def test_defaults_are_pefts():
    ours, theirs = LoraConfig(), peft.LoraConfig()
    for name in set(OF_KIND["applied"]) - {"target_modules"}:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine == other or not mine and not other


@pytest.mark.parametrize("name", OF_KIND["refused"])
def test_refused_field_is_refused_by_name(name):
    with pytest.raises(AdapterRefused, match=name) as refusal:
        parse_config({**PLAIN, name: REFUSED[name]})
    assert refusal.value.param == name
    if name != "peft_type":
        parse_config({**PLAIN, name: None})


@pytest.mark.parametrize("name", OF_KIND["applied"])
def test_applied_field_changes_the_pack(name, tmp_path):
    base = tied_llama if name in ("ensure_weight_tying", "trainable_token_indices") else llama
    common, value = APPLIED[name]
    layout = describe(base())
    packs = []
    for index, config in enumerate((common, {**common, name: value})):
        train(base(), tmp_path / str(index), **config)
        header = write_pack(tmp_path / str(index), layout, "h", tmp_path / f"{index}.pack")
        assert getattr(read_config(tmp_path / str(index)), name) == (value if index else getattr(read_config(tmp_path / "0"), name))
        packs.append((header, (tmp_path / f"{index}.pack").read_bytes()))
    if name == "layers_pattern":  # it only narrows what a path's number means: with another one nothing is targeted
        rewrite_config(tmp_path / "1", layers_pattern="blocks")
        with pytest.raises(AdapterRefused, match="does not explain"):
            write_pack(tmp_path / "1", layout, "h", tmp_path / "2.pack")
    else:
        assert packs[0] != packs[1]


@pytest.mark.parametrize("name", OF_KIND["inert"])
def test_inert_field_changes_nothing(name, tmp_path):
    folder = train(llama(), tmp_path / "adapter")
    layout = describe(llama())
    write_pack(folder, layout, "h", tmp_path / "0.pack")
    rewrite_config(folder, **{name: INERT[name]})
    write_pack(folder, layout, "h", tmp_path / "1.pack")
    assert (tmp_path / "0.pack").read_bytes() == (tmp_path / "1.pack").read_bytes()


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "something-new", 3])
def test_initialization_that_changes_the_base_is_refused(value):
    with pytest.raises(AdapterRefused, match="init_lora_weights.*path_initial_model_for_weight_conversion"):
        parse_config({**PLAIN, "init_lora_weights": value})


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialization_that_leaves_the_base_is_taken(value):
    assert parse_config({**PLAIN, "init_lora_weights": value}).target_modules == ["q_proj"]


def test_pissa_is_taken_once_peft_has_converted_it(tmp_path):
    """PEFT writes init_lora_weights=true and twice the rank into a converted adapter."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    layout = describe(llama())
    with pytest.raises(AdapterRefused, match="init_lora_weights is 'pissa'"):
        write_pack(tmp_path / "raw", layout, "h", tmp_path / "pack")
    assert write_pack(tmp_path / "converted", layout, "h", tmp_path / "pack").max_rank == 8


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_field_that_is_off_is_taken(value):
    parse_config({**PLAIN, "use_future": value})


@pytest.mark.parametrize("value", [True, 1, "x", [0], {"a": None}])
def test_unknown_field_that_is_on_is_refused_by_name(value):
    with pytest.raises(AdapterRefused, match="'use_future'"):
        parse_config({**PLAIN, "use_future": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0),
        ("r", True),
        ("r", 8.0),
        ("target_modules", None),
        ("target_modules", [1]),
        ("target_modules", "x" * 5000),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("r", 10**400),
        ("bias", "some"),
        ("use_dora", 1),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", [4]),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("layers_to_transform", ["1"]),
        ("layers_pattern", "layers"),
        ("modules_to_save", "lm_head"),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", {"embed_tokens": 3}),
    ],
)
def test_bad_value_is_refused_by_name(name, value):
    with pytest.raises(AdapterRefused, match=name) as refusal:
        parse_config({**PLAIN, name: value})
    assert refusal.value.param == name


@pytest.mark.parametrize("values", [{"lora_bias": True, "use_dora": True}, {"target_modules": "x", "layers_to_transform": 1}])
def test_combinations_that_peft_refuses_are_refused(values):
    with pytest.raises(AdapterRefused):
        parse_config({**PLAIN, **values})


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"r": 8}', b'{"peft_type": "LORA"}', b"{}" + b" " * (1 << 20)]
)
def test_file_that_is_no_config_is_refused(text, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterRefused):
        read_config(tmp_path)


def test_missing_config_is_refused(tmp_path):
    with pytest.raises(AdapterRefused, match="adapter_config.json"):
        read_config(tmp_path)
