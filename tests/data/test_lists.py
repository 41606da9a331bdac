"""Folder, glob, text list, index CSV: what is listed, how it is named, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mwm.data import DataError, assign_ids, image_id, read_list
from mwm.data.records import Record
from mwm.data.walk import expand_glob

GREY = np.zeros((4, 4), np.uint8)


@pytest.fixture
def tree(tmp_path: Path, png) -> Path:
    for name in ("b/two.png", "a/one.png", "three.jpg", ".hidden/x.png", "a/.y.png"):
        png(name, GREY)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def names(images, **options) -> list[str]:
    return [record.name for record in read_list(images, **options)]


def test_folder_lists_images_recursively_in_order_and_leaves_hidden_files_out(tree: Path) -> None:
    assert names(tree) == ["three.jpg", "a/one.png", "b/two.png"]


def test_glob_lists_what_matches_with_names_from_its_fixed_part(tree: Path) -> None:
    assert names(f"{tree}/*/*.png") == ["a/one.png", "b/two.png"]
    assert names(f"{tree}/**/*.png") == ["a/one.png", "b/two.png"]
    assert names(f"{tree}/a/o*.png") == ["one.png"]
    assert names(f"{tree}/**") == names(tree)
    with pytest.raises(DataError, match=r"glob .* matches no"):
        read_list(f"{tree}/*.tif")


def test_star_does_not_cross_folders(tree: Path) -> None:
    assert [path.name for path in expand_glob(f"{tree}/*.*")[1]] == ["notes.txt", "three.jpg"]


def test_text_list_and_csv_name_the_same_images_as_the_folder(tree: Path) -> None:
    (tree / "list.txt").write_text("b/two.png\n\na/one.png\n")
    (tree / "rows.csv").write_text("\ufeffFile ,label,extra\na/one.png,x,1\n./b/two.png,,2\n", encoding="utf-8")
    ids = {record.name: record.id for record in read_list(tree)}
    for listed in (tree / "list.txt", tree / "rows.csv"):
        for record in read_list(listed):
            assert record.id == ids[record.name]
    assert [record.label for record in read_list(tree / "rows.csv")] == ["x", None]


def test_all_columns_of_the_schema_are_read(tree: Path) -> None:
    (tree / "index.csv").write_text('file,split,label,patient,mask,boxes,prompt\n'
                                    'a/one.png,train,cyst,p1,b/two.png,"[{""label"": ""cyst"", ""bbox_xyxy"": [0, 1, 2, 3]}]",the cyst\nthree.jpg,test,,,,,\n')
    first, second = read_list(tree / "index.csv")
    assert (first.split, first.label, first.patient, first.prompt) == ("train", "cyst", "p1", "the cyst")
    assert first.mask == (tree / "b/two.png") and first.boxes == ({"label": "cyst", "bbox_xyxy": [0, 1, 2, 3]},)
    assert (second.label, second.patient, second.mask, second.boxes, second.prompt) == (None, None, None, (), None)
    assert names(tree, split="test") == ["three.jpg"], "a folder with an index.csv is read by it"
    with pytest.raises(DataError, match="split 'val' must have images, got none; it has test, train"):
        read_list(tree, split="val")


def test_id_is_32_bits_of_blake2b_of_the_relative_name(tree: Path) -> None:
    record = next(r for r in read_list(tree) if r.name == "a/one.png")
    assert record.id == int.from_bytes(hashlib.blake2b(b"a/one.png", digest_size=4).digest(), "big")
    assert record.hashed == f"{record.id:08x}" and len(record.hashed) == 8


def test_adding_files_changes_no_other_id(tree: Path, png) -> None:
    before = {record.name: record.id for record in read_list(tree)}
    png("a/zero.png", GREY)
    after = {record.name: record.id for record in read_list(tree)}
    assert {name: after[name] for name in before} == before


def test_colliding_ids_are_made_different_whatever_the_order() -> None:
    seen: dict[int, str] = {}
    pair = None
    for k in range(400_000):  # a birthday search: a collision is all but certain among so many
        name = f"scan_{k}.png"
        other = seen.setdefault(image_id(name), name)
        if other != name:
            pair = (other, name)
            break
    assert pair is not None
    records = [Record(Path(name), name, 0) for name in (*pair, "other.png")]
    forward = {record.name: record.id for record in assign_ids(records)}
    backward = {record.name: record.id for record in assign_ids(records[::-1])}
    assert forward == backward and len(set(forward.values())) == 3
    assert forward[min(pair)] == image_id(min(pair)) and forward["other.png"] == image_id("other.png")


@pytest.mark.parametrize(("row", "message"), [
    ("../outside.png", "must stay inside"), ("/etc/passwd", "must be relative"), ("C:\\scan.png", "must be relative"), ("a/../../x.png", "must stay inside"),
    ("~/x.png", "must be relative"), ("link/one.png", "link to a place outside"), ("a/one.png\na/one.png", "listed once"), ("a/one.png\nalias.png", "are the same file"),
])
def test_csv_paths_that_leave_the_root_or_repeat_are_refused(tree: Path, tmp_path_factory, png, row: str, message: str) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "one.png").write_bytes((tree / "a/one.png").read_bytes())
    (tree / "link").symlink_to(outside)
    (tree / "alias.png").symlink_to(tree / "a/one.png")
    for list_name, head in (("rows.csv", "file\n"), ("rows.txt", "")):
        (tree / list_name).write_text(f"{head}{row}\n")
        with pytest.raises(DataError, match=message):
            read_list(tree / list_name)


def test_a_mask_outside_the_root_is_refused(tree: Path) -> None:
    (tree / "rows.csv").write_text("file,mask\na/one.png,../m.png\n")
    with pytest.raises(DataError, match="line 2: paths must stay inside"):
        read_list(tree / "rows.csv")


def test_root_widens_where_paths_may_lie(tree: Path) -> None:
    (tree / "lists").mkdir()
    (tree / "lists" / "rows.csv").write_text("file\na/one.png\n")
    with pytest.raises(DataError, match=r"none of the 1 listed files is there .*give root"):
        read_list(tree / "lists" / "rows.csv")
    assert names(tree / "lists" / "rows.csv", root=tree) == ["a/one.png"]


@pytest.mark.parametrize(("text", "message"), [
    ("path,label\na.png,1\n", r"must have a column `file`, got path, label"), ("file\n", "must have rows"), ("file,label\n,x\n", "line 2: file must be a path"),
    ('file,boxes\na/one.png,"[1, 2"\n', "boxes must be a JSON list"), (f"file,boxes\na/one.png,[{'9' * 5000}]\n", "boxes must be a JSON list"),
    ("", "must have a column `file`, got none"), ('file,boxes\na/one.png,{}\n', "another JSON value"),
])
def test_csvs_that_do_not_fit_end_in_one_sentence(tree: Path, text: str, message: str) -> None:
    (tree / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_list(tree / "rows.csv")
    assert "\n" not in str(caught.value)


def test_a_csv_that_is_no_text_ends_in_one_sentence(tree: Path) -> None:
    (tree / "rows.csv").write_bytes(b"file\n" + bytes(range(256)) * 10)
    with pytest.raises(DataError, match="must be a CSV in UTF-8"):
        read_list(tree / "rows.csv")


def test_an_image_given_as_text_list_is_told_apart(tree: Path) -> None:
    (tree / "rows.lst").write_bytes(b"\x89\xff\xfe" * 50)
    with pytest.raises(DataError, match="Is it an image itself"):
        read_list(tree / "rows.lst")


def test_symlink_loop_is_refused(tree: Path) -> None:
    (tree / "a" / "loop").symlink_to(tree)
    for images in (tree, f"{tree}/**/*.png"):
        with pytest.raises(DataError, match="leads back to a folder above it"):
            read_list(images)


def test_symlink_to_itself_is_refused(tree: Path) -> None:
    (tree / "self.png").symlink_to(tree / "self.png")
    with pytest.raises(DataError, match="go in circles"):
        read_list(tree)


def test_a_name_that_the_system_refuses_is_said_to_be_one(tree: Path) -> None:
    (tree / "list.txt").write_text("a" * 5000 + "\n")
    with pytest.raises(DataError, match=r"must be the name of a file that can be opened, got: File name too long") as caught:
        read_list(tree / "list.txt")
    assert len(str(caught.value)) < 300


def test_links_are_followed_inside_and_refused_outside(tree: Path, tmp_path_factory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "new.png").write_bytes((tree / "a/one.png").read_bytes())
    (tree / "c").symlink_to(outside)
    with pytest.raises(DataError, match="link to a place outside"):
        read_list(tree)
    assert "c/new.png" in names(tree, root=tree.parent.parent)


def test_a_file_reached_twice_through_a_link_is_refused(tree: Path) -> None:
    (tree / "c").symlink_to(tree / "a")
    with pytest.raises(DataError, match="are the same file"):
        read_list(tree)


def test_absurd_lists_are_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mwm.data.walk.MAX_FILES", 2)
    with pytest.raises(DataError, match="at most 2 files"):
        read_list(tree)
    (tree / "rows.txt").write_text("a/one.png\n" * 9)
    monkeypatch.setattr("mwm.data.table.MAX_FILES", 2)
    with pytest.raises(DataError, match="at most 2 rows"):
        read_list(tree / "rows.txt")
    monkeypatch.setattr("mwm.data.table.MAX_LIST_BYTES", 10)
    with pytest.raises(DataError, match="MiB"):
        read_list(tree / "rows.txt")


def test_folders_nested_too_deep_are_refused(tmp_path: Path) -> None:
    (tmp_path.joinpath(*["d"] * 70)).mkdir(parents=True)
    with pytest.raises(DataError, match="at most 64 deep"):
        read_list(tmp_path)


def test_nothing_to_read_ends_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold PNG, JPEG, TIFF, DICOM or NIfTI files, got none"):
        read_list(tmp_path)
    (tmp_path / "scans").mkdir()
    with pytest.raises(DataError, match="Did you mean 'scans'"):
        read_list(tmp_path / "scan")
    with pytest.raises(DataError, match="empty text"):
        read_list(" ")


def test_missing_files_stay_in_the_list_to_be_skipped_later(tree: Path) -> None:
    (tree / "rows.csv").write_text("file\na/one.png\ngone.png\n")
    assert names(tree / "rows.csv") == ["a/one.png", "gone.png"]


def test_volumes_become_slices_and_a_row_can_pick_one(tree: Path, nifti) -> None:
    nifti("a/vol.nii.gz", np.zeros((3, 4, 5), np.int16))
    assert [n for n in names(tree) if "vol" in n] == [f"a/vol.nii.gz#z{k}" for k in range(5)]
    (tree / "rows.csv").write_text("file,label\na/vol.nii.gz#z3,x\n")
    (record,) = read_list(tree / "rows.csv")
    assert (record.name, record.frame, record.path.name, record.id) == ("a/vol.nii.gz#z3", "z3", "vol.nii.gz", image_id("a/vol.nii.gz#z3"))


def test_dicom_without_extension_is_listed(tmp_path: Path, dicom) -> None:
    dicom("IM0001", np.zeros((4, 4), np.uint16))
    (tmp_path / "README").write_text("x" * 200)
    assert names(tmp_path) == ["IM0001"]


def test_a_list_slices_to_a_list(tree: Path) -> None:
    assert [r.name for r in read_list(tree)[1:]] == ["a/one.png", "b/two.png"]
