"""Configuration: what wins, where it came from, and errors that say how to repair them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.settings import Settings, check_config, load_settings
from actors.settings_layers import Override, names_of_configs, parse_set_flag
from actors.settings_problems import leaves_of
from pipeline.errors import ConfigError

ROOT = Path(__file__).parent.parent
SECTIONS = [name for name, info in Settings.model_fields.items() if name not in {"runtime", "summary"}]


def write(folder: Path, text: str) -> str:
    path = folder / "test.yaml"
    path.write_text(text)
    return str(path)


def error_of(text: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(folder, text), environ={})
    return str(caught.value)


def flags(*texts: str) -> list[Override]:
    return [parse_set_flag(text) for text in texts]


@pytest.mark.parametrize("name", names_of_configs())
def test_every_file_in_configs_loads_by_name_and_by_path(name: str) -> None:
    assert check_config(name) == []
    by_name = load_settings(name, environ={}).settings
    assert by_name == load_settings(str(ROOT / "configs" / f"{name}.yaml"), environ={}).settings


def test_the_files_in_configs_differ() -> None:
    loaded = {name: load_settings(name, environ={}).settings.model_dump_json() for name in names_of_configs()}
    assert len(set(loaded.values())) == len(loaded) >= 4


def test_edge_yaml_says_what_the_defaults_are() -> None:
    assert load_settings(None, environ={}).settings == Settings()


def test_flags_win_over_the_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    config = write(tmp_path, "vad:\n  hangover_ms: 500\n  onset_ms: 80\n  mode: 1\n")
    environ = {"SURTITLE_VAD__HANGOVER_MS": "600", "SURTITLE_VAD__ONSET_MS": "90", "PATH": "/bin"}
    loaded = load_settings(config, flags("vad.hangover_ms=700"), environ)
    assert (loaded.settings.vad.hangover_ms, loaded.settings.vad.onset_ms, loaded.settings.vad.mode) == (700, 90, 1)
    origins = {item.key: item.origin for item in loaded.effective_values()}
    assert origins["vad.hangover_ms"] == "flag --set vad.hangover_ms"
    assert origins["vad.onset_ms"] == "environment SURTITLE_VAD__ONSET_MS"
    assert origins["vad.mode"].endswith("test.yaml:4")
    assert origins["vad.pre_roll_ms"] == "default"


def test_the_environment_names_the_file() -> None:
    assert load_settings(None, environ={"SURTITLE_CONFIG": "in-car"}).settings.runtime == "local"
    assert load_settings("edge", environ={"SURTITLE_CONFIG": "in-car"}).settings.runtime == "ray"


def test_text_of_flags_becomes_what_its_key_holds() -> None:
    given = flags(
        "captions.translate_to=en, de",
        "captions.languages=[no, sv]",
        "captions.language=no",
        "captions.has_partials=false",
        "redis.url=null",
        "summary.every_minutes=2",
        "decoder.scheduler.num_slots=3",
    )
    loaded = load_settings(None, given, {}).settings
    assert loaded.captions.translate_to == ("en", "de")
    assert loaded.captions.language == "no"
    assert loaded.captions.has_partials is False
    assert loaded.redis.url is None
    assert loaded.summary is not None
    assert loaded.summary.every_minutes == 2
    assert loaded.decoder.scheduler.num_slots == 3


def test_a_section_can_be_switched_on_and_off(tmp_path: Path) -> None:
    assert load_settings(None, flags("summary={}"), {}).settings.summary is not None
    assert load_settings("captioning", flags("summary=null"), {}).settings.summary is None
    assert load_settings(write(tmp_path, "vad:\n  # nothing yet\nsummary:\n"), environ={}).settings == Settings()


def test_a_wrong_unit_is_an_error_with_the_value_in_the_right_one(tmp_path: Path) -> None:
    message = error_of("vad:\n  hangover_s: 0.48\n", tmp_path)
    assert "test.yaml:2: vad.hangover_s = 0.48" in message
    assert "did you mean hangover_ms (milliseconds)?" in message
    assert "hangover_ms: 480" in message


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("vad:\n  hangover_ms: 480ms\n", "write the number of milliseconds without a unit: 480"),
        ("vad:\n  hangover_ms: 0.48 s\n", "write the number of milliseconds without a unit: 480"),
        ("vad:\n  onset_ms: 0.06\n", "0.06 seconds are 60"),
        ("vad:\n  hangover_ms: 99999\n", "less than or equal to 3000; the unit is milliseconds"),
        ("vad:\n  hangover_ms: -1\n", "greater than or equal to 60"),
        ("vad:\n  hangovr_ms: 480\n", "did you mean hangover_ms"),
        ("vda:\n  hangover_ms: 480\n", "did you mean vad?"),
        ("hangover_ms: 480\n", "did you mean vad.hangover_ms?"),
        ("vad:\n  hangover_ms: true\n", "expected a whole number of milliseconds"),
        ("captions:\n  language: no\n", 'quote it: "no"'),
        ("runtime: docker\n", "'ray' or 'local'"),
        ("service:\n  allowed_hosts: [captions.*.example]\n", "service.allowed_hosts"),
        ("vad: 3\n", "is a section"),
        ("vad:\n  hangover_ms: 100\n", "post_roll_ms=200 must not be above hangover_ms=100"),
        ("vad:\n  mode: 1\n  mode: 2\n", "test.yaml:3: vad.mode is given twice (first in line 2)"),
        ("vad: {mode: 1\n", "is not valid YAML"),
        ("- vad\n", "expected sections"),
        ("vad:\n  ? [a]\n  : 3\n", "unknown key"),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(text: str, fix: str, tmp_path: Path) -> None:
    message = error_of(text, tmp_path)
    assert fix in message
    assert "test.yaml" in message
    assert "\n" not in message


def test_a_value_of_the_environment_or_of_a_flag_is_blamed_on_it() -> None:
    with pytest.raises(ConfigError, match=r"^environment SURTITLE_VAD__HANGOVER_MS: vad\.hangover_ms = soon: "):
        load_settings(None, environ={"SURTITLE_VAD__HANGOVER_MS": "soon"})
    with pytest.raises(ConfigError, match=r"^environment SURTITLE_VAD_HANGOVER: .* did you mean"):
        load_settings(None, environ={"SURTITLE_VAD_HANGOVER": "3"})
    with pytest.raises(ConfigError, match=r"^flag --set vad\.moode: .*did you mean mode"):
        load_settings(None, flags("vad.moode=3"), {})
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_set_flag("vad.mode")


def test_a_rule_between_keys_is_blamed_on_the_layer_that_broke_it() -> None:
    with pytest.raises(ConfigError, match=r"^flag --set vad\.post_roll_ms: .*post_roll_ms=900"):
        load_settings("in-car", flags("vad.post_roll_ms=900"), {})


def test_all_problems_of_a_file_are_listed_by_its_check(tmp_path: Path) -> None:
    config = write(tmp_path, "vad:\n  mode: 9\n  onset_ms: 1\nredis:\n  retention_hours: -1\n")
    assert [(problem.key, problem.origin.rpartition(":")[2]) for problem in check_config(config)] == [
        ("vad.mode", "2"),
        ("vad.onset_ms", "3"),
        ("redis.retention_hours", "5"),
    ]
    with pytest.raises(ConfigError, match="and 2 more"):
        load_settings(config, environ={})


def test_a_password_never_appears(tmp_path: Path) -> None:
    for text in ("redis:\n  url: ftp://me:secret@host\n", "redis:\n  uri: redis://me:secret@host\n"):
        assert "secret" not in error_of(text, tmp_path)
    loaded = load_settings(write(tmp_path, "redis:\n  url: redis://me:secret@host:7000/0\n"), environ={})
    values = {item.key: item.value for item in loaded.effective_values()}
    assert values["redis.url"] == "redis://host:7000/0"


def test_a_file_that_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean factory\? known names: .*in-car"):
        load_settings("factroy", environ={})
    with pytest.raises(ConfigError, match="does not exist"):
        load_settings(str(tmp_path / "none.yaml"), environ={})
    with pytest.raises(ConfigError, match="is a directory"):
        load_settings(f"{tmp_path}/", environ={})
    (tmp_path / "latin.yaml").write_bytes(b"vad: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings(str(tmp_path / "latin.yaml"), environ={})


def test_every_key_has_a_description() -> None:
    assert [key for key, _, description in leaves_of(Settings()) if not description] == []


YAML_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.one_of(st.sampled_from(SECTIONS), st.text(max_size=8)), YAML_VALUES, max_size=4))
def test_any_file_loads_or_is_refused_with_a_configuration_error(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    import yaml  # noqa: PLC0415 - the reader under test has its own

    path = tmp_path_factory.mktemp("any") / "any.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    try:
        load_settings(str(path), environ={})
    except ConfigError as exc:
        assert str(exc)


def test_reading_the_configuration_loads_neither_torch_nor_ray() -> None:
    code = (
        "import actors.settings, sys; print([name for name in ('torch', 'ray', 'av', 'sumy') if name in sys.modules])"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.strip() == "[]"
