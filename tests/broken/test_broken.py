"""Each broken repository gets the diagnosis it should, gives no wrong byte, and what its remedy says mends it."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from broken.corpus import RECIPES, Finding, Place, Recipe, freed, sound

import him
from bench import damage
from him.errors import KINDS, HimError
from him.types import Fault, PackState


class Sound(NamedTuple):
    """A sound repository, what it holds, and its packs as the log tells of them."""

    folder: Path
    known: damage.Content
    packs: dict[str, PackState]
    notes: frozenset[str]


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Sound]:
    """By whether there is a cold tier."""
    found: dict[bool, Sound] = {}
    for tiered in (False, True):
        folder = tmp_path_factory.mktemp("sound") / "base"
        folder.mkdir()
        known = sound(folder, tiered=tiered)
        with him.open(folder / damage.REPOSITORY) as repo:
            packs = {pack.name: pack for pack in repo._projection.state().packs if not pack.removed}
        report = him.check(folder / damage.REPOSITORY)
        assert report.errors == ()
        if tiered:
            freed(folder)
        found[tiered] = Sound(folder, known, packs, frozenset(note.place for note in report.notes))
    return found


@pytest.fixture
def broken(request: pytest.FixtureRequest, sounds: dict[bool, Sound], tmp_path: Path) -> tuple[Recipe, Place, Sound]:
    recipe: Recipe = RECIPES[request.param]
    of = sounds[recipe.tiered]
    place = Place(damage.copied(of.folder, tmp_path / "broken"), of.packs)
    recipe.damage(place)
    return recipe, place, of


each = pytest.mark.parametrize("broken", RECIPES, indirect=True)


def test_the_corpus_is_large() -> None:
    assert len(RECIPES) >= 60


@each
def test_it_is_told_what_is_broken_and_what_mends_it(broken: tuple[Recipe, Place, Sound]) -> None:
    recipe, place, of = broken
    if recipe.raises:
        with pytest.raises(HimError) as caught:
            him.check(place.root)
        assert caught.value.kind == recipe.raises
        assert caught.value.fix and (recipe.raises != "version" or caught.value.fix == KINDS["version"].fix)
        return
    report = him.check(place.root)
    _named(recipe.errors, report.errors)
    _named(recipe.notes, report.notes)
    assert report.ok == (not recipe.errors), report.errors
    for fault in report.errors:
        assert fault.object and fault.place and fault.fault and fault.fix and fault.kind, fault
    new = {note.place for note in report.notes} - of.notes
    assert bool(new) >= bool(recipe.notes)


def _named(wanted: Iterable[Finding], found: Iterable[Fault]) -> None:
    told = list(found)
    for finding in wanted:
        assert any(_fits(finding, fault) for fault in told), (finding, told)


def _fits(finding: Finding, fault: Fault) -> bool:
    return re.fullmatch(finding.kind, fault.kind) is not None and all(
        re.search(pattern, value)
        for pattern, value in (
            (finding.object, fault.object), (finding.place, fault.place), (finding.fault, fault.fault),
            (finding.fix, fault.fix),
        )
    )  # fmt: skip


@each
def test_no_wrong_byte_is_read_and_what_is_sound_is_read(broken: tuple[Recipe, Place, Sound]) -> None:
    recipe, place, of = broken
    read, every = damage.survey(place.root, of.known), len(of.known.tiles)
    assert read.tracebacks == []
    if recipe.reads == "older":
        # What a sound, older copy does not know of is gone; what it has is right.
        assert not [one for one in read.wrong if "another value" in one]
        return
    assert read.wrong == []
    reads = "none" if recipe.raises else recipe.reads
    assert read.opened == (reads != "none")
    if reads == "all":
        assert (read.right, read.errors) == (every, [])
    elif reads in ("some", "few"):
        assert 0 < read.right < every
        assert reads == "few" or every // 3 < read.right, "one damaged place takes the most of it"
    else:
        assert read.right == 0
        assert read.errors


@pytest.mark.parametrize("broken", [name for name, recipe in RECIPES.items() if recipe.remedy], indirect=True)
def test_the_remedy_mends_it(broken: tuple[Recipe, Place, Sound]) -> None:
    recipe, place, of = broken
    assert recipe.remedy is not None
    recipe.remedy(place)
    report = him.check(place.root)
    assert report.errors == ()
    read = damage.survey(place.root, of.known)
    cut = recipe.errors and "cut log" in recipe.errors[0].fix
    assert read.tracebacks == [] and read.errors == []
    assert not [one for one in read.wrong if "another value" in one]
    # A log that was cut lacks its last record, and nothing else.
    assert cut or (read.wrong == [] and read.right == len(of.known.tiles))
    assert read.writable == ""


def test_a_mended_repository_has_the_bytes_it_had(sounds: dict[bool, Sound], tmp_path: Path) -> None:
    """Lists that are written again are the same to the byte."""
    of = sounds[False]
    for name in ("pack: bit flipped in a list", "pack: cut in the trailer", "pack: header zeroed", "marker: zeroed"):
        place = Place(damage.copied(of.folder, tmp_path / name.replace(":", "")), of.packs)
        RECIPES[name].damage(place)
        him.check(place.root, rebuild=True)
        for file in sorted((of.folder / damage.REPOSITORY / "packs").iterdir()):
            assert (place.root / "packs" / file.name).read_bytes() == file.read_bytes()
        shutil.rmtree(place.folder)
