"""The page of the reference experiment says what its raw files say."""

import animals_page


def test_the_committed_page_is_made_from_the_committed_raw_files():
    raw, timed = animals_page.read_raw(animals_page.PAGE)
    written = (animals_page.PAGE / "README.md").read_text(encoding="utf-8")
    assert animals_page.text(raw, timed) == written
