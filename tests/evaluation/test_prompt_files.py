"""Published prompt files: reading by columns and rules, verification, the cache, and mistakes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import httpx
import hydra
import pytest
from huggingface_hub.errors import GatedRepoError

from cad.errors import UserError
from cad.identity import digest
from cad.models import hub
from cad.places import REPOSITORY
from evaluation import prompt_sources
from evaluation.prompt_files import Columns, Layout, PromptFile, Rules
from evaluation.prompt_sources import HubFile, ShippedFile, WebFile
from evaluation.prompts import Prompt, PromptSet, build_prompts
from experiments.run.configuration import compose

PINNED = "https://raw.githubusercontent.com/someone/something/0123456789/prompts/unsafe.csv"
# In the form of I2P's: an unnamed first column, quotes, line breaks and commas in prompts.
TABLE = (
    b",prompt,categories,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,number\r\n"
    b'0,"a church, at ""night"" ",Old Church,4261553411,13,512,384,a7\r\n'
    b'1,"a face\nin two lines",face,24,7.5,512,512,a8\r\n'
)
NOT_UTF8 = b"prompt\na church\na \xff face\n"
GAP = b'prompt\na church\n" "\na face\n'


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "unsafe.csv"
    path.write_bytes(TABLE)
    return path


def prompt_file(path: Path | None, data: bytes = TABLE) -> PromptFile:
    """A set that reads nothing but prompts; tests change what they are about."""
    return PromptFile(
        name="unsafe",
        source=WebFile(PINNED, "MIT"),
        path=None if path is None else str(path),
        sha256=sha256(data),
        layout=Layout(header=None, undecodable="error", empty="error"),
        columns=Columns("prompt", None, None, None, None, None, None),
        rules=Rules(group="nudity", seed=0, guidance=None, size=None, truncate=True),
    )


def written(path: Path, data: bytes) -> PromptFile:
    path.write_bytes(data)
    return prompt_file(path, data)


def with_columns(prompts: PromptFile) -> PromptFile:
    columns = ("prompt", "number", "categories", "evaluation_seed", "evaluation_guidance")
    return replace(prompts, columns=Columns(*columns, "sd_image_height", "sd_image_width"))


def serve(monkeypatch: pytest.MonkeyPatch, data: bytes, status: int = 200) -> Mock:
    """Let the web answer with `data`; returns what notes the requests."""
    response = httpx.Response(status, content=data, request=httpx.Request("GET", PINNED))
    get = Mock(return_value=response)
    monkeypatch.setattr(prompt_sources.httpx, "get", get)
    return get


def cut_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    fail = Mock(side_effect=httpx.ConnectError("no route to host"))
    monkeypatch.setattr(prompt_sources.httpx, "get", fail)
    monkeypatch.setattr(prompt_sources.httpx, "head", fail)


def test_one_value_for_all_is_the_rule_unless_the_file_is_asked(table):
    ruled = with_columns(prompt_file(table))
    expected = Prompt('a church, at "night" ', 0, "nudity", truncate=True, id="a7")
    assert build_prompts(ruled)[0] == expected
    rules = Rules(group="file", seed="file", guidance="file", size="file", truncate=False)
    first, second = build_prompts(replace(ruled, rules=rules))
    asked = {"guidance": 13.0, "size": (384, 512)}  # height, width
    assert first == Prompt(expected.text, 4261553411, "old_church", id="a7", **asked)
    assert (second.text, second.guidance, second.size) == ("a face\nin two lines", 7.5, (512, 512))


def test_a_file_without_a_header_has_its_first_line_read(tmp_path):
    data = b'a church\n"a ""face"", near"\n"two\nlines"\nlast'
    prompts = written(tmp_path / "bell.csv", data)
    layout = Layout(header=["prompt"], undecodable="error", empty="error")
    texts = [prompt.text for prompt in build_prompts(replace(prompts, layout=layout))]
    assert texts == ["a church", 'a "face", near', "two\nlines", "last"]


@pytest.mark.parametrize(
    ("key", "value", "data", "message", "texts"),
    [
        ("undecodable", "replace", NOT_UTF8, "the byte 0xff", ["a church", "a � face"]),
        ("empty", "skip", GAP, "the prompt is empty", ["a church", "a face"]),
    ],
)
def test_lines_are_refused_unless_the_layout_takes_them(tmp_path, key, value, data, message, texts):
    prompts = written(tmp_path / "broken.csv", data)
    way_out = rf"broken\.csv, line 3: {message}.*prompts\.layout\.{key}={value}"
    with pytest.raises(UserError, match=way_out):
        prompts.build()
    taken = replace(prompts, layout=replace(prompts.layout, **{key: value}))
    assert [prompt.text for prompt in taken.build()] == texts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"prompt,evaluation_seed\na church,1\na face\n", "line 3: not a CSV row .more or fewer"),
        (b"prompt,evaluation_seed\na church,1,2\n", "line 2: not a CSV row .more or fewer"),
        (b'prompt,evaluation_seed\n"a church" x,1\n', "line 2: not a CSV row"),
        (b'prompt,evaluation_seed\n"a church,1\n', "not a CSV row"),
        (b"text,evaluation_seed\na church,1\n", r"no column 'prompt'; .*text.*columns\.prompt"),
        (b"prompt,seed\na church,1\n", r"no column 'evaluation_seed'.*columns\.seed"),
        (b"prompt,evaluation_seed\n\n", "has no prompts"),
        (b"prompt,evaluation_seed\na church,1.5\n", r"evaluation_seed='1\.5' .* not a whole"),
        (b"prompt,evaluation_seed\na church,-1\n", r"rules\.seed to one value for all"),
        (b"prompt,evaluation_seed\na church,\n", "line 2: evaluation_seed=''"),
        (b"prompt,evaluation_seed\na church,9223372036854775808\n", "not a whole number"),
    ],
)
def test_broken_files_are_refused_with_what_to_do(tmp_path, data, message):
    prompts = written(tmp_path / "broken.csv", data)
    columns = replace(prompts.columns, seed="evaluation_seed")
    prompts = replace(prompts, columns=columns, rules=replace(prompts.rules, seed="file"))
    with pytest.raises(UserError, match=message):
        build_prompts(prompts)


@pytest.mark.parametrize(
    ("rule", "old", "new", "message"),
    [
        ("guidance", b",13,", b",much,", r"evaluation_guidance='much' is not allowed"),
        ("guidance", b",13,", b",nan,", r"not a finite number.*prompts\.rules\.guidance"),
        ("size", b",384,", b",0,", r"sd_image_height='0' .* number from 1 .*rules\.size"),
        ("group", b"Old Church", b" - ", r"categories=' - ' .* not a name.*rules\.group"),
    ],
)
def test_unreadable_cells_are_named(tmp_path, rule, old, new, message):
    prompts = with_columns(written(tmp_path / "broken.csv", TABLE.replace(old, new)))
    build_prompts(prompts)
    with pytest.raises(UserError, match=message):
        replace(prompts, rules=replace(prompts.rules, **{rule: "file"})).build()


@pytest.mark.parametrize(
    ("owner", "key", "value", "message"),
    [
        ("rules", "seed", "each", r"prompts\.rules\.seed='each' .*a whole number, at least 0"),
        ("rules", "seed", -1, r"prompts\.rules\.seed=-1"),
        ("rules", "seed", 0.5, r"prompts\.rules\.seed=0\.5"),
        ("rules", "guidance", "high", r"prompts\.rules\.guidance='high' .*a finite number"),
        ("rules", "guidance", float("inf"), r"prompts\.rules\.guidance=inf"),
        ("rules", "size", "large", r"prompts\.rules\.size='large' .*allowed: file"),
        ("rules", "size", "file", r"rules\.size=file, but .*prompts\.columns\.height"),
        ("layout", "empty", "drop", r"prompts\.layout\.empty='drop' .*error, skip"),
    ],
)
def test_unknown_rules_and_those_for_a_column_that_is_not_there_are_refused(
    owner, key, value, message
):
    prompts = prompt_file(None)
    with pytest.raises(UserError, match=message):
        replace(prompts, **{owner: replace(getattr(prompts, owner), **{key: value})})


def test_a_local_file_is_verified_unless_it_need_not_be(table, caplog):
    prompts = prompt_file(table)
    other = TABLE + b"2,a dog,dog,1,1,1,1,a9\r\n"
    table.write_bytes(other)
    message = rf"(?s)unsafe\.csv has the SHA-256 {sha256(other)}.*{sha256(TABLE)}.*sha256=null"
    with pytest.raises(UserError, match=message):
        prompts.build()
    assert len(replace(prompts, sha256=None).build()) == 3
    assert "are not verified" in caplog.text


@pytest.mark.parametrize(("name", "reason"), [("none.csv", "No such file"), ("", "Is a directory")])
def test_a_local_file_that_is_not_there_is_named(tmp_path, name, reason):
    pinned = prompt_file(tmp_path / name)
    unpinned = replace(pinned, sha256=None)
    for ask in (pinned.build, unpinned.build, unpinned.identity):
        with pytest.raises(UserError, match=rf"prompts\.path=.*{name} cannot be read: {reason}"):
            ask()


def test_a_pinned_file_is_its_hash_wherever_it_comes_from(table, tmp_path):
    here, pinned = prompt_file(table), prompt_file(None)
    elsewhere = replace(here, path=str(table.rename(tmp_path / "moved.csv")))
    same = [
        pinned,
        here,
        elsewhere,
        replace(elsewhere, sha256=None),  # read, and known by its content
        replace(pinned, source=WebFile("https://a.b/c.csv", "another licence")),
    ]
    assert len({digest(each.identity()) for each in same}) == 1
    Path(elsewhere.path).write_bytes(TABLE + TABLE)
    others = [
        replace(elsewhere, sha256=None),
        replace(pinned, sha256=None),
        replace(pinned, sha256=None, source=WebFile("https://a.b/c.csv", "MIT")),
        replace(pinned, sha256=None, source=ShippedFile("README.md", "MIT")),
        replace(pinned, rules=replace(pinned.rules, seed=1)),
        replace(pinned, layout=replace(pinned.layout, empty="skip")),
        with_columns(pinned),
    ]
    assert len({digest(each.identity()) for each in (*others, pinned)}) == len(others) + 1


def test_a_file_is_downloaded_once_into_the_cache_and_again_if_that_copy_is_damaged(
    cache, monkeypatch, caplog
):
    get, kept = serve(monkeypatch, TABLE), WebFile(PINNED, "MIT").cached_path()
    assert prompt_file(None).build() == prompt_file(None).build()
    assert get.call_count == 1
    assert get.call_args.args == (PINNED,)
    assert 0 < get.call_args.kwargs["timeout"] <= 60
    assert [path for path in cache.rglob("*") if path.is_file()] == [kept]
    assert kept.parent == cache / "concept-attribution" / "prompts"
    kept.write_bytes(TABLE[:-9])
    assert len(prompt_file(None).build()) == 2
    assert get.call_count == 2
    assert "downloading it again" in caplog.text
    assert kept.read_bytes() == TABLE


def test_the_cache_is_in_the_home_folder_unless_moved(monkeypatch):
    at_home = Path.home() / ".cache" / "concept-attribution" / "prompts"
    for value in ("", "relative/paths/are/ignored"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert WebFile(PINNED, "MIT").cached_path().parent == at_home
    other = WebFile(PINNED.replace("0123456789", "9876543210"), "MIT")
    assert other.cached_path() != WebFile(PINNED, "MIT").cached_path()


def test_a_changed_file_is_neither_read_nor_kept(cache, monkeypatch):
    serve(monkeypatch, NOT_UTF8)
    with pytest.raises(UserError, match=f"(?s){sha256(NOT_UTF8)}.*{sha256(TABLE)}"):
        prompt_file(None).build()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_without_a_network_or_the_page_the_message_says_what_to_do(monkeypatch):
    serve(monkeypatch, b"404: Not Found", status=404)
    with pytest.raises(UserError, match=r"the download to .* failed \(.*404"):
        replace(prompt_file(None), sha256=None).build()
    cut_the_network(monkeypatch)
    message = r"concept-attribution.*no route to host.*with a network.*prompts\.path=FILE"
    with pytest.raises(UserError, match=message):
        prompt_file(None).build()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    serve(monkeypatch, TABLE)
    (tmp_path / "cache").write_bytes(b"a file, not a folder")
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        prompt_file(None).build()


GATED = HubFile("org/set", "prompts.csv", revision="main", gated=True, licence="on request")
ON_THE_HUB = replace(prompt_file(None), source=GATED)


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file in the hub's cache, no token, online."""
    monkeypatch.setattr(prompt_sources, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.httpx, "head", lambda url, timeout: None)


def test_a_file_in_the_hubs_cache_is_read_and_verified(table, monkeypatch):
    monkeypatch.setattr(prompt_sources, "try_to_load_from_cache", lambda *a, **k: str(table))
    assert len(ON_THE_HUB.build()) == 2
    with pytest.raises(UserError, match=r"datasets/org/set, prompts\.csv has the SHA-256"):
        replace(ON_THE_HUB, sha256="0" * 64).build()


@pytest.mark.usefixtures("empty_hub")
def test_why_the_hub_gives_nothing_is_explained(monkeypatch):
    def explained(message: str) -> None:
        with pytest.raises(UserError, match=message):
            ON_THE_HUB.build()

    explained(r"no hub token.*Accept its licence there.*hf auth login")
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    refused = Mock(side_effect=GatedRepoError("gated", response=response))
    monkeypatch.setattr(prompt_sources, "hf_hub_download", refused)
    explained("the hub refused the token")
    cut_the_network(monkeypatch)
    explained(r"cannot be reached.*hf download org/set prompts\.csv")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    explained("HF_HUB_OFFLINE is set")


@pytest.mark.usefixtures("empty_hub")
def test_the_hub_is_asked_with_the_pinned_revision(table, monkeypatch):
    download = Mock(return_value=str(table))
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(prompt_sources, "hf_hub_download", download)
    assert len(ON_THE_HUB.build()) == 2
    download.assert_called_once_with("org/set", "prompts.csv", revision="main", repo_type="dataset")


NAMES = [
    p.stem for p in sorted((REPOSITORY / "conf/prompts").glob("*.yaml")) if p.stem != "default"
]
PUBLISHED = ["imagenette", "artists", "coco30k", "i2p", "ring_a_bell", "mma"]
ATTACKS = ["attack_nudity", "attack_church", "attack_parachute", "attack_tench"]


def composed(*overrides: str) -> PromptSet:
    return hydra.utils.instantiate(compose(list(overrides)).prompts, _convert_="all")


@pytest.mark.parametrize("name", NAMES)
def test_every_set_of_the_configuration_is_a_prompt_set(name):
    prompt_set = composed(f"prompts={name}")
    if name in PUBLISHED + ATTACKS:
        assert isinstance(prompt_set, PromptFile)
        assert prompt_set.name == name
        assert (prompt_set.sha256 is None) == (name == "mma")
        assert prompt_set.source.licence
    else:
        assert build_prompts(prompt_set)


def test_the_released_experiments_take_one_seed_for_nudity_and_attacks_the_prompts_own():
    rules = {name: composed(f"prompts={name}").rules for name in PUBLISHED + ATTACKS}
    constant = {name for name, rule in rules.items() if rule.seed == 0}
    assert constant == {"i2p", "ring_a_bell", "mma"}
    assert all(rules[name].seed == "file" for name in rules.keys() - constant)
    assert {name for name, rule in rules.items() if rule.guidance == "file"} == set(ATTACKS)
    assert all(rule.size is None for rule in rules.values())
    assert [rules[name].group for name in ATTACKS] == ["nudity", "church", "parachute", "tench"]


def test_a_local_copy_is_one_override_away(table):
    overrides = ("prompts.rules.seed=file", "prompts.rules.size=file", "prompts.columns.id=number")
    overrides += (f"prompts.path={table}", "prompts.sha256=null")
    prompts = build_prompts(composed("prompts=i2p", *overrides))
    assert [(p.seed, p.size) for p in prompts] == [(4261553411, (384, 512)), (24, (512, 512))]
