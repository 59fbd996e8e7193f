"""Merged packs are what PEFT's add_weighted_adapter makes; what cannot be merged is refused by name."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils

from server.adapters import merge
from server.adapters.merge import merge_hash, merge_packs
from server.adapters.pack import load_pack, view_tensor, write_pack
from server.adapters.strategies import majority_sign_mask, prune_randomly, prune_small
from server.errors import AdapterRefused, ValidationFailed
from tests.server.adapters.layouts import describe, llama, pack_outputs, tied_llama, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

IDS = torch.tensor([[0, 3, 1, 60, 5]])
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]


def make(tmp_path, *configs, base=llama):
    """Adapters saved by PEFT and their packs: folders, paths."""
    layout, folders, packs = describe(base()), [], []
    for index, config in enumerate(configs):
        folder = train(base(), tmp_path / f"a{index}", seed=index, **config)
        write_pack(folder, layout, f"hash{index}", tmp_path / f"a{index}.pack")
        folders.append(folder)
        packs.append(tmp_path / f"a{index}.pack")
    return layout, folders, packs


def merged(tmp_path, packs, weights, strategy, density=0.5, method="total", seed=0, max_rank=64):
    return merge_packs(list(zip(packs, weights, strict=True)), strategy, density, method, seed, max_rank, tmp_path / "merged")


def peft_logits(folders, weights, combination_type, density, method="total"):
    model = PeftModel.from_pretrained(llama(), str(folders[0]), adapter_name="a0")
    names = ["a0"]
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=f"a{index}")
        names.append(f"a{index}")
    model.add_weighted_adapter(names, weights, "m", combination_type=combination_type, density=density, majority_sign_method=method)
    model.set_adapter("m")
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def check(tmp_path, layout, expected):
    logits, _ = pack_outputs(llama(), layout, tmp_path / "merged", IDS, [])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert (expected - llama()(input_ids=IDS).logits).abs().max() > 1e-3


@pytest.mark.parity(
    "2",
    "`merged_adapters`, linear",
    "better",
    "the exact weighted sum of the adapters, of any ranks; LoRAX's has cross terms and wants equal ranks",
)
def test_linear_is_pefts_cat_with_mixed_ranks_targets_and_negative_weights(tmp_path):
    configs = (
        {"target_modules": TARGETS, "r": 4, "lora_alpha": 3},
        {"target_modules": ["q_proj", "k_proj"], "r": 8, "use_rslora": True},
        {"target_modules": TARGETS, "r": 2},
    )
    layout, folders, packs = make(tmp_path, *configs)
    weights = [0.7, 1.5, -0.4]
    header = merged(tmp_path, packs, weights, "linear", density=0.0)
    assert header.max_rank == 14
    by_name = {layout.sites[site.site].name: site for site in header.sites}
    q, k, v = (by_name[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    assert k.a.offset == q.a.offset + q.rank * 32 * 4 and v.a.offset == k.a.offset + k.rank * 32 * 4  # still one matrix
    check(tmp_path, layout, peft_logits(folders, weights, "cat", 1.0))


def test_linear_sums_lora_biases(tmp_path):
    layout, folders, packs = make(tmp_path, {"lora_bias": True}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, {})
    header = merged(tmp_path, packs, [2.0, -1.0, 1.0], "linear")
    headers = [load_pack(path) for path in packs]
    site = header.sites[0]
    _, data = load_pack(tmp_path / "merged")
    parts = [view_tensor(d, h.sites[0].bias, "float32") for h, d in headers[:2]]
    np.testing.assert_allclose(view_tensor(data, site.bias, "float32"), 2 * parts[0] - parts[1], atol=1e-6)


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_strategies_are_pefts_without_pruning(tmp_path, strategy, method):
    layout, folders, packs = make(
        tmp_path, {"target_modules": TARGETS}, {"target_modules": ["q_proj", "k_proj"]}, {"target_modules": TARGETS}
    )
    weights = [0.7, 1.5, -0.4]
    merged(tmp_path, packs, weights, strategy, density=1.0, method=method)
    check(tmp_path, layout, peft_logits(folders, weights, strategy, 1.0, method))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parity("2", "`merged_adapters`, ties", "same")
def test_ties_is_pefts_with_pruning(tmp_path, density):
    layout, folders, packs = make(tmp_path, {"target_modules": TARGETS}, {"target_modules": TARGETS}, {"target_modules": TARGETS})
    weights = [0.7, 1.5, 0.4]
    merged(tmp_path, packs, weights, "ties", density=density)
    check(tmp_path, layout, peft_logits(folders, weights, "ties", density))


@pytest.mark.parametrize("strategy", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_with_the_same_mask(tmp_path, strategy, monkeypatch):
    """Both draw from the entries themselves: which are kept is the same, so is everything after."""

    def keep(tensor):
        return (tensor * 1000).astype(np.int64) % 3 != 0

    def ours(tensor, density, generator):
        return tensor * keep(tensor) / np.float32(density)

    def theirs(tensor, density, rescale):
        assert rescale
        return tensor * torch.from_numpy(keep(tensor.numpy())) / density

    layout, folders, packs = make(tmp_path, {"target_modules": TARGETS}, {"target_modules": TARGETS})
    monkeypatch.setattr("server.adapters.strategies.prune_randomly", ours)
    monkeypatch.setattr(merge_utils, "random_pruning", theirs)
    merged(tmp_path, packs, [0.7, 1.5], strategy, density=0.6)
    check(tmp_path, layout, peft_logits(folders, [0.7, 1.5], strategy, 0.6))


@pytest.mark.parity(
    "2",
    "`merged_adapters`, dare_linear and dare_ties",
    "better",
    "what is kept is rescaled; LoRAX forgets to. `density` 0 is refused, LoRAX prunes everything",
)
def test_dare_keeps_the_expected_value_and_is_the_same_every_time(tmp_path):
    layout, _, packs = make(tmp_path, {"target_modules": TARGETS}, {"target_modules": TARGETS})
    first = merged(tmp_path, packs, [1.0, 1.0], "dare_linear", density=0.5, seed=1)
    raw = (tmp_path / "merged").read_bytes()
    merged(tmp_path, packs, [1.0, 1.0], "dare_linear", density=0.5, seed=1)
    assert (tmp_path / "merged").read_bytes() == raw
    other = merged(tmp_path, packs, [1.0, 1.0], "dare_linear", density=0.5, seed=2)
    assert (tmp_path / "merged").read_bytes() != raw and other.hash != first.hash
    ones = np.ones((400, 400), np.float32)
    pruned = prune_randomly(ones, 0.25, np.random.default_rng(0))
    assert set(np.unique(pruned)) == {0.0, 4.0} and abs(pruned.mean() - 1) < 0.02


def test_one_adapter_is_scaled_whatever_the_strategy(tmp_path):
    layout, folders, packs = make(tmp_path, {"target_modules": TARGETS})
    header = merged(tmp_path, packs, [-0.5], "ties", density=0.1)
    check(tmp_path, layout, peft_logits(folders, [-0.5], "cat", None))
    assert header.hash == merge_hash([("hash0", -0.5)], "linear", 0.9, "total", 3)


def test_hash_is_of_what_matters_alone():
    inputs = [("a", 1.0), ("b", 0.5)]
    assert merge_hash(inputs, "linear", 0.1, "total", 1) == merge_hash(inputs, "linear", 0.9, "frequency", 2)
    assert merge_hash(inputs, "ties", 0.1, "total", 1) == merge_hash(inputs, "ties", 0.1, "total", 2)
    assert merge_hash(inputs, "dare_linear", 0.1, "total", 1) == merge_hash(inputs, "dare_linear", 0.1, "frequency", 1)
    different = [
        merge_hash(inputs, "linear", 0.1, "total", 1),
        merge_hash(inputs[::-1], "linear", 0.1, "total", 1),
        merge_hash([("a", 1.0), ("b", 0.6)], "linear", 0.1, "total", 1),
        merge_hash(inputs, "ties", 0.1, "total", 1),
        merge_hash(inputs, "ties", 0.2, "total", 1),
        merge_hash(inputs, "ties", 0.1, "frequency", 1),
        merge_hash(inputs, "dare_ties", 0.1, "total", 1),
        merge_hash(inputs, "dare_ties", 0.1, "total", 2),
    ]
    assert len(set(different)) == len(different) and all(len(hash) == 64 for hash in different)


def test_rank_is_bounded(tmp_path):
    _, _, packs = make(tmp_path, {"r": 4}, {"r": 8})
    assert merged(tmp_path, packs, [1, 1], "linear", max_rank=12).max_rank == 12
    (tmp_path / "merged").unlink()
    with pytest.raises(AdapterRefused, match="rank 12; at most 11"):
        merged(tmp_path, packs, [1, 1], "linear", max_rank=11)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_different_ranks_are_for_linear_alone(tmp_path, strategy):
    _, _, packs = make(tmp_path, {"r": 4}, {"r": 8})
    with pytest.raises(AdapterRefused, match=r"\[4, 8\]"):
        merged(tmp_path, packs, [1, 1], strategy)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"resize": 70}, "added tokens"),
    ],
)
@pytest.mark.parametrize("strategy", ["linear", "ties"])
def test_what_replaces_weights_cannot_be_merged(tmp_path, config, reason, strategy):
    _, _, packs = make(tmp_path, {}, config)
    with pytest.raises(AdapterRefused, match=reason):
        merged(tmp_path, packs, [1, 1], strategy)


def test_lora_bias_is_for_linear_alone(tmp_path):
    _, _, packs = make(tmp_path, {"lora_bias": True}, {"lora_bias": True})
    with pytest.raises(AdapterRefused, match="lora_bias"):
        merged(tmp_path, packs, [1, 1], "ties")


def test_packs_of_different_bases_are_refused(tmp_path):
    _, folders, packs = make(tmp_path, {}, {})
    write_pack(folders[0], describe(llama(), "bfloat16"), "other", packs[0])
    with pytest.raises(AdapterRefused, match="different bases"):
        merged(tmp_path, packs, [1, 1], "linear")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"strategy": "svd"}, "merge_strategy"),
        ({"strategy": "ties", "density": 0.0}, "density"),
        ({"strategy": "dare_linear", "density": 1.1}, "density"),
        ({"strategy": "dare_ties", "density": float("nan")}, "density"),
        ({"strategy": "ties", "method": "mean"}, "majority_sign_method"),
        ({"weights": [1.0, float("inf")]}, "weights"),
    ],
)
def test_wrong_parameter_is_named(tmp_path, change, param):
    _, _, packs = make(tmp_path, {}, {})
    with pytest.raises(ValidationFailed, match=param):
        merged(tmp_path, packs, **{"weights": [1, 1], "strategy": "linear", **change})
    with pytest.raises(ValidationFailed, match="ids"):
        merge.check_merge(0, [], "linear", 0.5, "total")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_merges_in_float32(tmp_path, dtype):
    layout, folders, packs = make(tmp_path, {"target_modules": TARGETS}, {"target_modules": TARGETS}, base=tied_llama)
    for folder, path in zip(folders, packs, strict=True):
        write_pack(folder, describe(tied_llama(), dtype), "h", path)
    header = merged(tmp_path, packs, [1.0, 1.0], "linear")
    assert header.dtype == dtype
    (one, one_data), (_, data) = load_pack(packs[0]), load_pack(tmp_path / "merged")
    q = next(site for site in header.sites if site.group >= 0)
    source = next(site for site in one.sites if site.site == q.site)
    np.testing.assert_array_equal(
        view_tensor(data, q.a, dtype)[:4], view_tensor(one_data, source.a, dtype)
    )  # equal factors: not one rounding


def test_pieces_are_pefts():
    torch.manual_seed(0)
    stacked = torch.randn(3, 7, 5)
    for density in (0.0, 0.01, 0.3, 0.99, 1.0):
        np.testing.assert_array_equal(prune_small(stacked[0].numpy(), density), merge_utils.prune(stacked[0], density, "magnitude").numpy())
    for method in ("total", "frequency"):
        expected = merge_utils.calculate_majority_sign_mask(stacked, method).numpy()
        np.testing.assert_array_equal(majority_sign_mask(stacked.numpy(), method), expected)
