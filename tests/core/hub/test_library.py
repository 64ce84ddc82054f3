"""Models by name: what is found where, what is said of what is not, and what deleting leaves alone."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from qchat.core import BUILT_IN_MODEL
from qchat.core.errors import ModelError, UsageError
from qchat.core.hub import cache as hubcache
from qchat.core.hub import catalog, library
from qchat.core.hub.catalog import PUBLISHED
from qchat.core.hub.library import LocalModel, Locations, ModelNotDownloaded
from qchat.core.quant.plan import load_config, plan_variants
from tests.checkpoints import quantize_checkpoint, write_checkpoint
from tests.paths import QWEN, ROOT

CONFIGS = QWEN / "configs"
COMMIT, OTHER = 40 * "a", 40 * "b"
BIG = "Brooooooklyn/Qwen3.6-27B-UD-Q2_K_XL-mlx"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "raw"
    write_checkpoint(folder, shards=2)
    return folder


@pytest.fixture
def places(tmp_path: Path) -> Locations:
    for name in ("models", "hub"):
        (tmp_path / name).mkdir()
    return Locations((tmp_path / "models",), tmp_path / "hub", tmp_path / "state/models.json")


def put(source: Path, target: Path) -> Path:
    """The model again at `target`, without copying it."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        os.link(path, target / path.name)
    return target


def cached(source: Path, places: Locations, id: str, commit: str = COMMIT, revision: str = "main") -> Path:
    """The model in the hub's cache."""
    known = hubcache.Repository(places.cache, id)
    digests = {path.name: f"{commit[0]}{number}" for number, path in enumerate(sorted(source.iterdir()))}
    known.blob("x").parent.mkdir(parents=True, exist_ok=True)
    for name, digest in digests.items():
        os.link(source / name, known.blob(digest))
    known.publish(commit, digests, revision)
    return known.snapshot(commit)


def refusal(name: str, places: Locations, error: type[ModelError] = ModelError) -> str:
    with pytest.raises(error) as caught:
        library.find_model(name, places)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def only(places: Locations, name: str) -> LocalModel:
    return library.select_model(name, library.list_models(places))


# --- names ---


def test_a_folder_is_its_own_name(raw: Path, places: Locations, monkeypatch: pytest.MonkeyPatch):
    assert library.find_model(str(raw), places) == raw
    monkeypatch.chdir(raw.parent)
    assert library.find_model("raw", places) == Path("raw")
    monkeypatch.chdir(raw)
    assert library.find_model(".", places) == Path()


def test_models_are_found_in_every_place(raw: Path, places: Locations, tmp_path: Path):
    plain = put(raw, places.folders[0] / "plain")
    nested = put(raw, places.folders[0] / "owner/nested")
    snapshot = cached(raw, places, "me/cached")
    used = put(raw, tmp_path / "elsewhere/used")
    library.record_use(used, places)
    for name, folder in (("plain", plain), ("owner/nested", nested), ("nested", nested), ("used", used)):
        assert library.find_model(name, places) == folder
    for name in ("me/cached", "cached", "Cached", "me/cached@main", f"me/cached@{COMMIT[:7]}"):
        assert library.find_model(name, places) == snapshot
    origins = {model.name: model.origin for model in library.list_models(places)}
    assert origins == {
        "plain": "models folder",
        "owner/nested": "models folder",
        "me/cached": "hub cache",
        "used": "recently used",
        "embedded": "built-in",
    }


def test_the_built_in_model_has_a_name(places: Locations):
    assert library.find_model("built-in", places) == library.find_model("embedded", places) == BUILT_IN_MODEL


def test_a_unique_beginning_is_enough(raw: Path, places: Locations):
    first = put(raw, places.folders[0] / "Qwen3.5-9B-4bit")
    assert library.find_model("qwen3.5-9", places) == first
    put(raw, places.folders[0] / "Qwen3.5-9B-8bit")
    assert refusal("qwen3.5-9", places).startswith(
        "qwen3.5-9 is ambiguous (Qwen3.5-9B-4bit, Qwen3.5-9B-8bit)"
    )
    assert library.find_model("Qwen3.5-9B-4bit", places) == first


def test_a_whole_name_comes_before_longer_ones(raw: Path, places: Locations):
    short, _ = (put(raw, places.folders[0] / name) for name in ("tiny", "tiny-2"))
    assert library.find_model("tiny", places) == short


def test_of_two_models_with_one_name_the_models_folder_has_it(raw: Path, places: Locations, tmp_path: Path):
    library.record_use(put(raw, tmp_path / "elsewhere/tiny"), places)
    folder = put(raw, places.folders[0] / "tiny")
    assert library.find_model("tiny", places) == folder


def test_a_typo_gets_the_nearest_names(raw: Path, places: Locations):
    put(raw, places.folders[0] / "granite")
    assert refusal("granit", places.__class__((), places.cache, places.used)).startswith("there is no model")
    assert refusal("grainte", places).endswith("did you mean granite?")
    assert BIG in refusal("Qwen3.6-27B-UD-Q2_KXL-mlx", places)


def test_a_known_published_model_can_be_fetched_by_the_beginning_of_its_name(places: Locations):
    with pytest.raises(ModelNotDownloaded) as caught:
        library.find_model("Qwen3.6-27B-UD-Q2", places)
    assert caught.value.id == library.published_id("qwen3.6-27b-ud-q2") == BIG
    assert "is ambiguous" in refusal("Qwen3.6-27B", places)


def test_an_id_that_is_not_here_can_be_fetched(places: Locations):
    with pytest.raises(ModelNotDownloaded) as caught:
        library.find_model("me/none@v1", places)
    assert caught.value.id == "me/none@v1" and caught.value.exit_code == 3
    assert str(caught.value) == "me/none@v1 is not on this machine: download it with `qchat pull me/none@v1`"


def test_an_id_that_was_fetched_in_part_is_not_here(raw: Path, places: Locations):
    snapshot = cached(raw, places, "me/half")
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    for name in ("me/half", "half"):
        assert "is only partly downloaded" in refusal(name, places, ModelNotDownloaded)
    begun = hubcache.Repository(places.cache, "me/begun")
    begun.partial("0" * 64).parent.mkdir(parents=True)
    begun.partial("0" * 64).write_bytes(b"x" * 100)
    assert "is only partly downloaded" in refusal("me/begun", places, ModelNotDownloaded)
    problem = only(places, "me/begun").problem
    assert problem == "partly downloaded: finish it with `qchat pull me/begun`"


def test_two_commits_of_one_model_are_told_apart(raw: Path, places: Locations):
    cached(raw, places, "me/two", COMMIT)
    new = cached(raw, places, "me/two", OTHER)
    names = [model.name for model in library.list_models(places)]
    assert names[:2] == ["me/two", f"me/two@{COMMIT[:8]}"] or names[1::-1] == [
        "me/two",
        f"me/two@{COMMIT[:8]}",
    ]
    assert library.find_model("me/two", places) == new


@pytest.mark.parametrize(
    "name", ["x" * 300, "a\0b", "~nobody-here/x", "../x" * 2000, " ", "a/b/c", "@", "é\n"]
)
def test_names_that_cannot_be_are_refused_in_a_sentence(name: str, places: Locations):
    refusal(name, places)


@given(st.text(alphabet="aB1-_./@\\~ \0", max_size=24))
def test_ids_and_revisions_lead_nowhere_else(text: str):
    try:
        id, revision = hubcache.parse_id(text)
    except UsageError:
        return
    validate_repo_id(id)
    cache = Path("/cache")
    known = hubcache.Repository(cache, id)
    assert known.folder.parent == cache
    for path in (known.folder, known.folder / "refs" / revision):
        assert Path(os.path.normpath(path)) == path and path.is_relative_to(cache)


# --- what is said of a model ---


def test_sizes_are_those_of_the_files(raw: Path, places: Locations):
    put(raw, places.folders[0] / "raw")
    quantize_checkpoint(raw, places.folders[0] / "packed", (4, 32, "affine"))
    for name, low, high in (("raw", 16, 16.2), ("packed", 5, 6)):
        model = only(places, name)
        shards = model.path.glob("*.safetensors")
        assert model.problem is None and model.context == 4096
        assert model.nbytes == sum(path.stat().st_size for path in shards)
        assert model.bits_per_weight is not None and low <= model.bits_per_weight < high
        assert model.fit is not None and model.fit.fits
        assert json.loads(json.dumps(model.as_json()))["fit"]["context"] == 4096


@pytest.mark.parametrize("damage", ["config", "shard", "cut", "tokenizer", "kind", "index", "number"])
def test_a_model_that_cannot_be_loaded_says_why(raw: Path, places: Locations, damage: str):
    folder = put(raw, places.folders[0] / "bad")
    shard = folder / "model-00002-of-00002.safetensors"
    if damage in ("shard", "number"):
        shard.unlink()
    if damage in ("index", "number"):
        (folder / "model.safetensors.index.json").unlink()
    if damage == "index":
        (folder / "model-00003-of-00003.safetensors").write_bytes(shard.read_bytes())
    if damage == "tokenizer":
        (folder / "tokenizer.json").unlink()
    replaced: dict[str, tuple[Path, bytes]] = {
        "cut": (shard, shard.read_bytes()[:-9] if damage == "cut" else b""),
        "config": (folder / "config.json", b"{"),
        "kind": (folder / "config.json", b'{"model_type": "llama"}'),
    }
    if damage in replaced:
        path, data = replaced[damage]
        path.unlink()  # it is linked to the model of the other tests
        path.write_bytes(data)
    model = only(places, "bad")
    assert model.problem and "\n" not in model.problem
    assert library.load_problem(folder) == model.problem


def test_what_does_not_fit_says_by_how_much(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "model_limit_nbytes", lambda: 16 * 10**9)
    fits = {variant.id: variant.fit for variant in PUBLISHED}
    nine = fits["Brooooooklyn/Qwen3.5-9B-UD-Q4_K_XL-mlx"]
    assert nine.fits and nine.context == 236_736
    assert nine.summary == "fits: 8.4 of 16.0 GB of memory, context up to 236,736 tokens"
    big = fits["Brooooooklyn/Qwen3.6-27B-UD-Q4_K_XL-mlx"]
    assert not big.fits and big.context == 0
    assert big.summary == "does not fit: needs 22.4 GB of memory, 16.0 GB are available"


def test_the_most_useful_model_is_the_largest_with_room_for_a_long_conversation(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(catalog, "model_limit_nbytes", lambda: 24 * 10**9)
    ranked = catalog.rank_models(PUBLISHED)
    assert [one.id.rpartition("/")[2] for one in ranked[:2]] == [
        "Qwen3.6-35B-A3B-UD-Q3_K_XL-mlx",
        "Qwen3.6-27B-UD-Q2_K_XL-mlx",
    ]
    fitting = [one.fit.fits for one in ranked]
    assert fitting == sorted(fitting, reverse=True)
    assert [one.nbytes for one in ranked if not one.fit.fits] == sorted(
        one.nbytes for one in PUBLISHED if not one.fit.fits
    )


@pytest.mark.skipif(not CONFIGS.exists(), reason="the published configs are not here")
def test_published_sizes_are_what_the_recipes_give():
    for family in catalog.FAMILIES:
        config = load_config(CONFIGS / f"{family.base}.config.json")
        plans = plan_variants(config, as_published=True)
        assert family.token_nbytes == catalog.token_nbytes(config)
        for name, nbytes, bits in family.variants:
            vision = sum(row.nbytes for row in plans[name].rows if row.name == "vision")
            assert (nbytes, family.vision_nbytes) == (plans[name].total_bytes, vision)
            assert bits == pytest.approx(plans[name].total.bits_per_weight, abs=0.001)


@pytest.mark.skipif(not CONFIGS.exists(), reason="the published configs are not here")
def test_qwen_3_8_is_listed_with_the_dimensions_of_3_6():
    config = load_config(CONFIGS / "Qwen3.6-27B.config.json")
    weights = plan_variants(config, as_published=True)["UD-Q4_K_XL"].total.weights
    (listed,) = [one for one in PUBLISHED if "Qwen3.8" in one.id]
    family = next(one for one in catalog.FAMILIES if one.base == "Qwen3.6-27B")
    assert listed.vision_nbytes == family.vision_nbytes
    assert listed.token_nbytes == catalog.token_nbytes(config)
    assert listed.bits_per_weight == pytest.approx(8 * listed.nbytes / weights, abs=0.001)
    assert library.published_id("Qwen3.8-27B") == listed.id


def test_published_models_that_are_here_are_not_offered(raw: Path, places: Locations):
    assert BIG in {variant.id for variant in library.list_published(places)}
    cached(raw, places, BIG)
    assert BIG not in {variant.id for variant in library.list_published(places)}


def test_listing_needs_neither_mlx_nor_the_network(tmp_path: Path):
    script = (
        "import sys, socket; socket.socket = None\n"
        "from qchat.core.hub import library; library.list_models(); library.list_published()\n"
        "assert not {'mlx', 'httpx2', 'numpy'} & set(sys.modules), set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".dev"), "HF_HOME": str(tmp_path)}
    import subprocess

    subprocess.run([sys.executable, "-c", script], env=env, check=True)


# --- what was used before ---


def test_the_model_used_last_is_the_usual_one(raw: Path, places: Locations, tmp_path: Path):
    assert library.default_model(places) == (BUILT_IN_MODEL, None)
    first, second = (put(raw, tmp_path / name) for name in ("first", "second"))
    for folder in (first, second, first, BUILT_IN_MODEL):
        library.record_use(folder, places)
    assert library.default_model(places) == (first, None)
    assert [entry["path"] for entry in json.loads(places.used.read_text())["used"]] == [
        str(first),
        str(second),
    ]


def test_a_model_that_vanished_is_explained(raw: Path, places: Locations, tmp_path: Path):
    folder = put(raw, tmp_path / "gone-soon")
    library.record_use(folder, places)
    folder.rename(tmp_path / "gone-son")
    sentence = refusal(str(folder), places)
    assert sentence.startswith(f"the model folder {folder}, last used on 20")
    assert sentence.endswith(f"does not exist; did you mean {tmp_path / 'gone-son'}?")
    usual, why = library.default_model(places)
    assert usual == BUILT_IN_MODEL and why == f"{sentence}; using the built-in model instead"


def test_a_disk_that_is_not_mounted_is_named(places: Locations):
    assert refusal("/Volumes/Tiny SSD/models/x", places) == (
        "the model folder /Volumes/Tiny SSD/models/x is on /Volumes/Tiny SSD, which is not mounted"
    )
    gone = Locations((Path("/Volumes/Tiny SSD/models"),), places.cache, places.used)
    assert library.missing_folder_notices(gone) == [
        "the models folder /Volumes/Tiny SSD/models is on /Volumes/Tiny SSD, which is not mounted"
    ]


def test_a_last_model_that_was_damaged_does_not_stop_the_start(raw: Path, places: Locations, tmp_path: Path):
    folder = put(raw, tmp_path / "used")
    library.record_use(folder, places)
    (folder / "tokenizer.json").unlink()
    usual, why = library.default_model(places)
    assert usual == BUILT_IN_MODEL and why and "tokenizer.json" in why


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"used": 3}', '{"used": [3, {"path": 1}, {"path": "x", "when": 1}]}', "\0"]
)
def test_a_list_of_used_models_that_makes_no_sense_counts_as_none(places: Locations, text: str):
    places.used.parent.mkdir()
    places.used.write_text(text)
    assert library.last_used_folder(places) is None


def test_where_nothing_can_be_written_models_are_forgotten(raw: Path, places: Locations):
    places.used.parent.write_text("a file")
    library.record_use(raw, places)
    assert library.last_used_folder(places) is None


# --- deleting ---


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_deleting_takes_the_model_and_its_folder(raw: Path, places: Locations):
    put(raw, places.folders[0] / "tiny")
    removal = library.plan_removal(only(places, "tiny"))
    assert removal.nbytes == sum(path.stat().st_size for path in raw.iterdir())
    assert removal.execute() == [] and everything(places.folders[0]) == set()
    assert raw.exists()


def test_deleting_leaves_what_is_not_the_models(raw: Path, places: Locations):
    folder = put(raw, places.folders[0] / "tiny")
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub/data.bin").write_text("mine")
    removal = library.plan_removal(only(places, "tiny"))
    (folder / "model-late.safetensors").write_text("came after the list")
    assert [path.name for path in removal.execute()] == ["model-late.safetensors", "notes.txt", "sub"]
    assert everything(folder) == {"model-late.safetensors", "notes.txt", "sub", "sub/data.bin"}


def test_deleting_a_link_leaves_what_it_leads_to(raw: Path, places: Locations, tmp_path: Path):
    real = put(raw, tmp_path / "real")
    (places.folders[0] / "link").symlink_to(real)
    library.plan_removal(only(places, "link")).execute()
    assert everything(places.folders[0]) == set()
    assert everything(real) == everything(raw)


def test_deleting_from_the_cache_keeps_what_other_commits_use(raw: Path, places: Locations):
    old, new = cached(raw, places, "me/two", COMMIT), cached(raw, places, "me/two", OTHER)
    other = cached(raw, places, "me/other")
    library.plan_removal(only(places, f"me/two@{COMMIT[:8]}")).execute()
    assert not old.exists() and library.load_problem(new) is None
    library.plan_removal(only(places, "me/two")).execute()
    assert not new.parents[1].exists() and library.load_problem(other) is None


def test_deleting_what_was_fetched_in_part_frees_the_disk(places: Locations):
    begun = hubcache.Repository(places.cache, "me/begun")
    begun.partial("0" * 64).parent.mkdir(parents=True)
    begun.partial("0" * 64).write_bytes(b"x" * 100)
    removal = library.plan_removal(only(places, "me/begun"))
    assert removal.nbytes == 100
    removal.execute()
    assert not begun.folder.exists()


def test_the_built_in_model_is_not_deleted(places: Locations):
    with pytest.raises(UsageError, match="part of qchat"):
        library.plan_removal(only(places, "embedded"))


def test_only_what_is_listed_can_be_named_for_deletion(raw: Path, places: Locations):
    listed: Any = library.list_models(places)
    with pytest.raises(ModelError, match="`qchat models` lists no model"):
        library.select_model(str(raw), listed)
