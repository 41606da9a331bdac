"""Pictures and pages: what they show is what they were given, and a page needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mwm import view
from mwm.view.chart import labels, ticks
from mwm.view.pixels import HIDDEN_RGB, REGION_RGB, drawable, font, to_rgb
from mwm.view.sheet import _wrapped


def _image(channels: int = 1, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_pictures_accept_any_number_of_channels_and_keep_the_aspect(channels: int) -> None:
    assert view.picture(_image(channels), size=192).size == (192, 128)


def test_grey_values_survive_as_8_bit_grey() -> None:
    pixels = to_rgb(torch.tensor([[0.0, 0.5, 1.0, 2.0, float("nan")]]))
    assert pixels[0, :, 0].tolist() == [0, 128, 255, 255, 0]
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_a_batch_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="Pass one image"):
        view.picture(torch.zeros(2, 1, 8, 8))


def test_hidden_patches_are_covered_and_visible_ones_are_untouched() -> None:
    image = _image(1, 64, 96)
    active = np.ones((2, 3), bool)
    active[1, 2] = False
    plain, masked = (np.asarray(p).astype(int) for p in (view.picture(image, size=96), view.mask_picture(image, active, size=96)))
    changed = (plain != masked).any(-1)
    assert changed[33:64, 65:96].mean() > 0.99
    assert not changed[:32].any() and not changed[:, :64].any()
    assert (masked[50, 80] == HIDDEN_RGB).all()


def test_the_outline_follows_the_region() -> None:
    region = np.zeros((64, 64))
    region[16:48, 16:48] = 1
    drawn = np.asarray(view.overlay(torch.zeros(1, 64, 64), region, size=64))
    rows, columns = np.nonzero((drawn == REGION_RGB).all(-1))
    assert {rows.min(), columns.min()} == {14} and {rows.max(), columns.max()} == {49}
    assert not ((rows > 16) & (rows < 47) & (columns > 16) & (columns < 47)).any()


def test_an_empty_region_draws_no_outline() -> None:
    drawn = np.asarray(view.overlay(_image(), np.zeros((64, 96))))
    assert not (drawn == REGION_RGB).all(-1).any()


def test_reconstruction_pastes_visible_patches_and_clamps_hidden_ones() -> None:
    images, active = torch.full((1, 1, 64, 64), 0.25), torch.tensor([[[True, False], [True, True]]])
    sheet = view.reconstruction_sheet(images, active, torch.full_like(images, 7.0), size=64)
    filled = np.asarray(sheet.rows[0][1][2].image)[..., 0]
    assert filled[10, 54] == 255 and filled[54, 10] == 64
    assert view.reconstruction_panel(images, active, images).width > 4 * 200


def test_gallery_writes_the_hidden_shares_and_a_dash_where_there_is_no_region() -> None:
    shares = np.array([[0.8, 0.4, 0.6], [np.nan, 0.5, 0.5]])
    sheet = view.gallery([_image(), _image()], np.zeros((2, 64, 96)), np.ones((2, 2, 3), bool), ["a", "b"], shares=shares)
    captions = [cells[-1].caption for _, cells in sheet.rows]
    assert "80 % inside, 40 % outside" in captions[0] and "hidden: - inside" in captions[1]


def test_confusion_matrix_refuses_names_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="K = 3"):
        view.confusion_matrix(np.eye(2), ["a", "b", "c"])
    assert view.confusion_matrix(np.eye(2), ["a", "b" * 60]).width < 1200


def test_loss_curve_survives_infinite_values_and_one_point() -> None:
    chart = view.loss_curve({"loss": (range(4), [3.0, float("nan"), float("inf"), 1.0])})
    assert not re.search(r"[\s\",]nan|inf[\s\",]", chart.svg()) and chart.image().width > 700
    assert "<circle" in view.loss_curve({"loss": ([0], [1.0])}).svg()
    with pytest.raises(ValueError, match="finite"):
        view.loss_curve({"loss": ([0], [float("nan")])})


def test_ticks_are_round_and_inside() -> None:
    assert labels(ticks(0.93, 2.04)) == ["1.00", "1.25", "1.50", "1.75", "2.00"]
    assert labels(ticks(0, 400, 4)) == ["0", "100", "200", "300", "400"]


class _References(HTMLParser):
    """Collects everything a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in {"src", "srcset", "data", "poster"} or (tag in {"link", "image", "use"} and name in {"href", "xlink:href"}):
                self.fetched.append(value or "")


def test_report_is_one_file_without_network_or_scripts(tmp_path) -> None:
    sheet = view.Sheet(("Image",)).add("row", view.picture(_image()))
    page = view.Report("A <title> & more", "lead").section("One", "Some `code` and **weight** <b>not markup</b>.").sheet(sheet, "Caption.")
    page.chart(view.loss_curve({"loss": ([0, 1], [2.0, 1.0])}), "Loss.").table(["name", "value"], [["x", "0.5"]]).note("careful", kind="warning")
    text = page.write(tmp_path / "deep" / "report.html").read_text()
    parser = _References()
    parser.feed(text)
    assert parser.fetched and all(source.startswith("data:image/") for source in parser.fetched)
    assert parser.scripts == 0 and "url(" not in text and "@import" not in text
    assert "&lt;b&gt;not markup" in text and "<code>code</code>" in text and "<title>A &lt;title&gt;" in text
    assert re.search(r"Figure 2\.", text) and list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "report.html"]


def test_save_leaves_the_old_file_when_writing_fails(tmp_path) -> None:
    target = view.save(view.picture(_image()), tmp_path / "a.png")
    before = target.read_bytes()

    class Broken:
        def save(self, *args, **settings) -> None:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        view.save(Broken(), target)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]
    with Image.open(target) as kept:
        assert kept.size == (288, 192)


def test_a_share_that_does_not_exist_is_drawn_with_a_letter_that_the_typeface_has() -> None:
    typeface = font(14)
    absent = bytes(typeface.getmask("\uffff"))
    for letter in view.percent(float("nan")) + view.percent(0.5):
        assert bytes(typeface.getmask(letter)) != absent, f"{letter!r} would be drawn as a box"


def test_words_are_drawn_with_letters_that_the_typeface_has() -> None:
    assert drawable("Méningiome – Größe 3 × 4, łuk") == "Meningiome - Grosse 3 x 4, luk"
    assert drawable("plain text: 39 % “as is”") == "plain text: 39 % “as is”"
    assert drawable("cut short…") == "cut short..."
    assert drawable("肺炎 é\n2") == "?? e\n2"
    typeface = font(14)
    absent = bytes(typeface.getmask("\uffff"))
    for letter in drawable("".join(map(chr, range(32, 0x2200)))):
        assert bytes(typeface.getmask(letter)) != absent, f"{letter!r} would be drawn as a box"


def test_letters_that_the_typeface_lacks_look_alike_in_every_picture() -> None:
    table = [[3, 1], [0, 4]]
    assert view.confusion_matrix(table, ["Größe", "méso"], title="–").tobytes() == view.confusion_matrix(table, ["Grosse", "meso"], title="-").tobytes()
    tile = Image.new("RGB", (40, 40))
    first, second = (view.Sheet((words,)).add(words, view.Cell(tile, words)).image(cell=80).tobytes() for words in ("Übersicht", "Ubersicht"))
    assert first == second


def test_a_line_never_ends_between_a_number_and_its_sign() -> None:
    words = "hidden: 81 % inside, 39 % outside, 43 % overall"
    for width in range(40, 400, 3):
        lines = _wrapped(words, font(14), width)
        assert " ".join(lines) == words and not any(line.startswith("%") for line in lines)
