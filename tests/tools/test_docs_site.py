"""Links between the pages, in the checkout and on the site. `mkdocs build --strict` checks the rest in CI."""

import pytest
import yaml
from builders import ROOT
from docs_site import _LINK, OUTSIDE, rewritten, site_path

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
