"""Links between the pages, in the checkout and on the site. `mkdocs build --strict` checks the rest in CI."""

from pathlib import Path

import docs_pictures
import pytest
import yaml
from builders import ROOT, drawn_image
from docs_site import _LINK, OUTSIDE, rewritten, site_path

from kg_detectron.io.images import read_image, write_png

PAGES = [*OUTSIDE, *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page: str) -> None:
    for _, _, target, _ in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    leaves = str(yaml.safe_load(text)["nav"])
    for page in PAGES:
        assert f"'{site_path(page)}'" in leaves, page


def test_the_site_has_a_page_for_each_need() -> None:
    needs = "install first_steps tables settings train cluster detectron2 api messages add_a_method".split()
    assert {f"docs/{need}.md" for need in needs} <= set(PAGES)


def test_pictures_are_made_by_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the site are the script's, and that of the models, which tools/figures.py makes."""
    pictures = {path.stem for path in (ROOT / "docs" / "pictures").iterdir()}
    assert pictures == {*docs_pictures.PICTURES, "comparison"}
    for name in "ab":
        write_png(tmp_path / f"{name}.png", drawn_image(48, 64))
    monkeypatch.setattr(docs_pictures, "EXAMPLES", tmp_path)
    docs_pictures.main(["first_steps", "-o", str(tmp_path / "out")])
    height, gap = docs_pictures.HEIGHT, docs_pictures.GAP
    assert read_image(tmp_path / "out" / "first_steps.png").shape == (height, 2 * height * 4 // 3 + gap, 3)


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("README.md", "[p](docs/predict.md)", "[p](predict.md)"),
        ("docs/train.md", "[d](../datasets/README.md#raw)", "[d](project/datasets/README.md#raw)"),
        ("results/README.md", "![c](../docs/pictures/napari.png)", "![c](../../pictures/napari.png)"),
        ("README.md", "[see LICENSE](LICENSE)", "see LICENSE (`LICENSE`)"),
        ("docs/predict.md", "[x](https://example.org)", "[x](https://example.org)"),
    ],
)
def test_links_of_the_site(source: str, text: str, expected: str) -> None:
    assert rewritten(text, source) == expected
