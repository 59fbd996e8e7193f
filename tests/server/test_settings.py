"""Settings: three ways in and their order, every mistake named, help that explains everything."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import asdict
from pydantic import ValidationError

from server.api.app import engine_options
from server.settings import Settings, SettingsError, read_settings
from server.settings.reading import PREFIX

NEEDED = ["--model-id", "m"]


def read(*flags: str, env: dict | None = None, file: str | None = None, tmp_path: Path | None = None) -> Settings:
    extra = []
    if file is not None:
        assert tmp_path is not None
        (tmp_path / "settings.toml").write_text(file)
        extra = ["--config", str(tmp_path / "settings.toml")]
    return read_settings([*NEEDED, *extra, *flags], env or {})


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = 'port = 1\nmax_best_of = 1\nmax_batch_size = 1\nlog_level = "debug"'
    env = {"MANYLORA_PORT": "2", "MANYLORA_MAX_BEST_OF": "2", "MAX_BEST_OF": "9", "BLOCK_SIZE": "9"}
    settings = read("--port", "3", env=env, file=file, tmp_path=tmp_path)
    assert (settings.port, settings.max_best_of, settings.max_batch_size, settings.block_size) == (3, 2, 1, 16)
    assert settings.log_level == "debug"


def test_lorax_names_of_the_environment() -> None:
    env = {
        "PORT": "80",
        "MAX_INPUT_LENGTH": "7",
        "PREDIBASE_MODEL_BUCKET": "b",
        "ADAPTER_SOURCE": "s3",
        "HOSTNAME": "pod-1",
        "MODEL_ID": "other",
    }
    settings = read_settings([], env)
    assert (settings.port, settings.max_input_length, settings.model_bucket, settings.adapter_source) == (80, 7, "b", "s3")
    assert settings.model_id == "other" and settings.hostname == "127.0.0.1"


def test_spellings() -> None:
    settings = read("--kv-cache-bytes=2GiB", "-p", "5", "--lorax-strict", "--prefix-caching", "false", "--allowed-buckets", "a,b/c",
                    "--allowed-buckets", "d", "--max-total-tokens", "auto")  # fmt: skip
    assert settings.kv_cache_bytes == 2 << 30 and settings.port == 5 and settings.lorax_strict is True and settings.prefix_caching is False
    assert settings.allowed_buckets == ["a", "b/c", "d"] and settings.max_total_tokens is None


def test_the_config_file_may_come_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('model_id = "m"\nallowed_buckets = ["x", "y"]\nprefix_caching = false')
    settings = read_settings([], {"MANYLORA_CONFIG": str(tmp_path / "s.toml")})
    assert settings.allowed_buckets == ["x", "y"] and settings.prefix_caching is False


def test_what_the_engine_is_asked_for_by_the_same_name_reaches_it() -> None:
    settings = read("--kernel-trials-s", "7", "--overlap", "false", "--num-threads", "3", "--quantize", "int8", "--max-total-tokens", "64")
    options = asdict(engine_options(settings, SimpleNamespace(folder="m", revision="r")))  # type: ignore[arg-type]
    shared = Settings.model_fields.keys() & options.keys()
    assert {"kernel_trials_s", "overlap", "num_threads", "quantize"} <= shared
    assert {name: options[name] for name in shared} == {name: getattr(settings, name) for name in shared} | {"revision": "r"}


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        (["--max-bestof", "1"], {}, "unknown flag --max-bestof; did you mean --max-best-of?"),
        (["stray"], {}, "unknown flag stray"),
        (["--max-best"], {}, "unknown flag --max-best"),
        ([], {"MANYLORA_MAX_BESTOF": "1"}, "unknown environment variable MANYLORA_MAX_BESTOF; did you mean MANYLORA_MAX_BEST_OF?"),
        (["--port", "x"], {}, "--port (flag): Input should be a valid integer"),
        ([], {"PORT": "tcp://10.0.0.1:80"}, "--port (PORT): Input should be a valid integer"),
        (["--port", "70000"], {}, "less than or equal to 65535. Given: '70000'"),
        (["--dtype", "int3"], {}, "'auto', 'float32', 'bfloat16' or 'float16'"),
        (["--device", "tpu"], {}, "--device"),
        (["--drain-timeout-s", "nan"], {}, "--drain-timeout-s"),
        (["--num-blocks", "1", "--kv-cache-bytes", "1"], {}, "exclude each other"),
        (["--max-input-length", "5", "--max-total-tokens", "5"], {}, "max_input_length must be < max_total_tokens. Given: 5 and 5"),
        (["--max-batch-prefill-tokens", "5"], {}, "max_batch_prefill_tokens must be >= max_batch_size"),
        (["--config", "/nowhere.toml"], {}, "config file /nowhere.toml: No such file"),
        (["--lorax-strict", "maybe"], {}, "--lorax-strict (flag)"),
    ],
)
def test_mistakes_are_named(flags: list, env: dict, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(*flags, env=env)
    assert words in str(caught.value)


def test_what_is_required_is_said() -> None:
    with pytest.raises(SettingsError, match="--model-id is required"):
        read_settings([], {})


@pytest.mark.parametrize(
    ("file", "words"), [("prot = 1", "prot; did you mean port?"), ("port = [1", "settings.toml"), ("[a]\nb = 1", "a; did")]
)
def test_mistakes_of_the_file_are_named(tmp_path: Path, file: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(file=file, tmp_path=tmp_path)
    assert words in str(caught.value)


def test_help_explains_every_setting(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(["--help"], {})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown and PREFIX + name.upper() in shown
        assert field.description and field.description.split(";")[0][:30] in shown


def test_every_setting_can_be_set_in_every_way(tmp_path: Path) -> None:
    """Each default, written out, is read back from flags, environment and file alike."""
    for name, field in Settings.model_fields.items():
        if name == "model_id" or field.default is None or field.default == []:
            continue
        text = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        text = ",".join(field.default) if isinstance(field.default, list) else text
        assert getattr(read(f"--{name.replace('_', '-')}", text), name) == field.default
        assert getattr(read(env={PREFIX + name.upper(): text}), name) == field.default
        assert getattr(read(file=f'{name} = "{text}"', tmp_path=tmp_path), name) == field.default


def test_resolved_settings() -> None:
    store = Path("/store")
    assert read().resolved(max_positions=8192, store_dir=store).max_total_tokens == 4096
    small = read("--default-adapter-source", "s3").resolved(max_positions=1024, store_dir=store)
    assert (small.max_total_tokens, small.max_input_length, small.store_dir, small.default_adapter_source) == (1024, 1023, store, "s3")
    assert read("--max-total-tokens", "9").resolved(max_positions=None, store_dir=store).max_input_length == 8
    with pytest.raises(ValueError, match="max_total_tokens must be <= 1024"):
        read("--max-total-tokens", "2048").resolved(max_positions=1024, store_dir=store)
    with pytest.raises(ValueError, match="max_total_tokens must be set"):
        read().resolved(max_positions=None, store_dir=store)
    with pytest.raises(ValueError, match="max_input_length must be < max_total_tokens"):
        read("--max-input-length", "1024").resolved(max_positions=1024, store_dir=store)


def test_the_admin_key_is_never_shown() -> None:
    key = "a-key-of-16-or-more"
    settings = read(env={"MANYLORA_ADMIN_KEY": key})
    assert settings.admin_key is not None and settings.admin_key.get_secret_value() == key
    resolved = settings.resolved(max_positions=64, store_dir=Path("/store"))
    assert resolved.admin_key == settings.admin_key and resolved.registry_dir == Path("/store/registry")
    assert key not in resolved.model_dump_json() + repr(resolved)
    with pytest.raises(SettingsError, match="--admin-key") as caught:
        read(env={"MANYLORA_ADMIN_KEY": "too-short"})
    assert "MANYLORA_ADMIN_KEY" in str(caught.value) and "too-short" not in str(caught.value)


def test_settings_are_frozen() -> None:
    settings = read()
    with pytest.raises(ValidationError):
        settings.port = 5  # type: ignore[misc]
