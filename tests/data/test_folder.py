import pytest

from fedpeft.data.folder import find

pytestmark = pytest.mark.fast


def test_no_path_is_explained():
    with pytest.raises(
        ValueError, match=r"data.path is not set.*data.path=FOLDER with train.csv and test.csv, or data.path=FILE \(of .csv, .tsv\)"
    ):
        find(None, (".csv", ".tsv"))


def test_a_missing_path_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.path=.*none: looked for .*none, which does not exist"):
        find(str(tmp_path / "none"), (".csv",))


def test_a_folder_without_a_training_file_lists_what_it_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder holds nothing"):
        find(str(tmp_path), (".csv",))
    for letter in "abcdefghij":
        (tmp_path / f"{letter}.csv").touch()
    with pytest.raises(
        FileNotFoundError, match=r"looked for a file train.\* of .csv, the folder holds a.csv, .* h.csv and 2 more; .*data.train=FILE"
    ):
        find(str(tmp_path), (".csv",))


def test_the_files_that_start_with_train_and_test_are_found(tmp_path):
    for name in ("train.v2.csv", "test.csv", "train.md", "testing.csv"):
        (tmp_path / name).touch()
    assert find(str(tmp_path), (".csv",)) == (tmp_path / "train.v2.csv", tmp_path / "test.csv")


def test_two_training_files_are_not_guessed_between(tmp_path):
    for name in ("train.csv", "train.csv.gz"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds train.csv, train.csv.gz: name the one to read with data.train=FILE"):
        find(str(tmp_path), (".csv", ".csv.gz"))
    assert find(str(tmp_path), (".csv", ".csv.gz"), train="train.csv") == (tmp_path / "train.csv", None)


def test_a_file_is_the_training_file_whatever_lies_beside_it(tmp_path):
    for name in ("mine.csv", "test.csv"):
        (tmp_path / name).touch()
    assert find(str(tmp_path / "mine.csv"), (".csv",)) == (tmp_path / "mine.csv", None)
    with pytest.raises(ValueError, match=r"is the training file already; drop data.train=test.csv"):
        find(str(tmp_path / "mine.csv"), (".csv",), train="test.csv")
