"""Model cards: whose README.md it is, and what a table in one replaces."""

import pytest
from huggingface_hub import ModelCardData

from sketch_perceptual.files import card_path, replacing
from sketch_perceptual.networks.style_net import JohnsonNet
from sketch_perceptual.training import cards


def write(folder):
    cards.write_card(
        folder, data=ModelCardData(license="mit"), title="T", description="D", snippet="s", options={"rank": 4}
    )


@pytest.fixture
def theirs(tmp_path):
    (tmp_path / "README.md").write_text("# My project, which uses sketch-perceptual\n")
    return tmp_path


def test_the_readme_of_somebody_else_is_kept(theirs, caplog):
    before = (theirs / "README.md").read_bytes()
    write(theirs)
    with replacing(theirs) as partial:
        JohnsonNet(width=4).save_pretrained(partial)
    assert (theirs / "README.md").read_bytes() == before
    assert "MODEL_CARD.md" in caplog.text
    assert cards.set_section(theirs, "Scores", [["a"], ["1"]], "about") is None  # the style network's card has no such
    write(theirs)
    assert cards.set_section(theirs, "Scores", [["a"], ["1"]], "about") == theirs / "MODEL_CARD.md"
    assert (theirs / "README.md").read_bytes() == before


def test_a_model_card_of_somebody_else_is_kept_too(theirs):
    (theirs / "MODEL_CARD.md").write_text("# Another\n")
    for _ in range(2):
        write(theirs)
    assert (theirs / "MODEL_CARD.md").read_text() == "# Another\n"
    assert "| rank | 4 |" in (theirs / "MODEL_CARD-sketch-perceptual.md").read_text()
    assert cards.set_section(theirs, "Scores", [["a"], ["1"]], "about") == theirs / "MODEL_CARD-sketch-perceptual.md"


def test_scores_that_no_card_of_this_program_can_take_are_a_warning(theirs, caplog):
    (theirs / "README.md").write_text("# My project\n\n## Training\n")
    assert cards.set_section(theirs, "Scores", [["a"], ["1"]], "about") is None
    assert str(theirs / "README.md") in caplog.text and "scores" in caplog.text
    assert (theirs / "README.md").read_text() == "# My project\n\n## Training\n"
    caplog.clear()
    assert cards.set_section(theirs / "none", "Scores", [["a"], ["1"]], "about") is None
    assert not caplog.text


def test_cards_of_this_program_are_replaced(tmp_path):
    with replacing(tmp_path) as partial:
        JohnsonNet(width=4).save_pretrained(partial)
    assert card_path(tmp_path).name == "README.md"
    write(tmp_path)
    assert "| rank | 4 |" in (tmp_path / "README.md").read_text()
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.md")) == ["README.md"]
