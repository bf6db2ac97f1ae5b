import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysp.data.dataset import TokenDataset
from raysp.errors import InputError


def write_documents(folder, documents, *, name="data-00000.parquet", with_length=True, masks=None, rows=2):
    columns = {"input_ids": pa.array(documents, type=pa.list_(pa.int32()))}
    if with_length:
        columns["length"] = pa.array([len(document or ()) for document in documents], type=pa.int64())
    if masks is not None:
        columns["loss_mask"] = pa.array(masks, type=pa.list_(pa.bool_()))
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / name, row_group_size=rows)
    return folder


def documents_of(*lengths):
    return [[100 * index + place for place in range(length)] for index, length in enumerate(lengths)]


@pytest.mark.parametrize("with_length", [True, False])
def test_every_sequence_has_the_tokens_of_its_document(tmp_path, with_length):
    documents = documents_of(5, 3, 1, 17, 64, 2, 9)
    write_documents(tmp_path / "d", documents[:4], with_length=with_length)
    write_documents(tmp_path / "d", documents[4:], name="data-00001.parquet", with_length=with_length)
    dataset = TokenDataset.open(tmp_path / "d")
    assert dataset.sequence_lengths.dtype == np.int64
    assert dataset.sequence_lengths.tolist() == [5, 3, 1, 17, 64, 2, 9]
    for index in (6, 0, 3, 5, 1, 4, 2):
        sequence = dataset.sequence(index)
        assert sequence.input_ids.dtype == np.int64
        assert sequence.input_ids.tolist() == documents[index]
        assert sequence.is_target.tolist() == [False] + [True] * (len(documents[index]) - 1)


def test_a_single_file_opens_as_the_folder_does(tmp_path):
    folder = write_documents(tmp_path / "d", documents_of(4, 2))
    assert TokenDataset.open(folder / "data-00000.parquet").sequence_lengths.tolist() == [4, 2]


def test_large_lists_and_int64_ids_are_read(tmp_path):
    table = pa.table({"input_ids": pa.array([[1, 2], [3]], type=pa.large_list(pa.int64()))})
    pq.write_table(table, tmp_path / "x.parquet")
    assert TokenDataset.open(tmp_path).sequence(0).input_ids.tolist() == [1, 2]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(min_value=1, max_value=50), min_size=1, max_size=12),
    max_length=st.integers(min_value=1, max_value=60),
)
def test_split_documents_keep_every_token_in_nearly_equal_pieces(tmp_path_factory, lengths, max_length):
    documents = documents_of(*lengths)
    folder = write_documents(tmp_path_factory.mktemp("d"), documents)
    dataset = TokenDataset.open(folder, max_length=max_length)
    pieces = {}
    for index in range(dataset.num_sequences):
        sequence = dataset.sequence(index)
        assert 1 <= len(sequence.input_ids) == dataset.sequence_lengths[index] <= max_length
        assert not sequence.is_target[0]
        assert sequence.is_target[1:].all()
        pieces.setdefault(dataset.document_of(index), []).append(sequence.input_ids.tolist())
    for document, parts in pieces.items():
        assert list(chain.from_iterable(parts)) == documents[document]
        assert len(parts) == -(-len(documents[document]) // max_length)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sorted(pieces) == list(range(len(documents)))


def test_loss_mask_limits_targets_and_never_the_first_token(tmp_path):
    masks = [[True, False, True, True], [False, True]]
    folder = write_documents(tmp_path / "d", documents_of(4, 2), masks=masks)
    dataset = TokenDataset.open(folder)
    assert dataset.sequence(0).is_target.tolist() == [False, False, True, True]
    assert dataset.sequence(1).is_target.tolist() == [False, True]
    halves = TokenDataset.open(folder, max_length=2)
    assert halves.sequence(1).is_target.tolist() == [False, True]


def test_a_returned_sequence_can_be_changed_without_changing_the_dataset(tmp_path):
    folder = write_documents(tmp_path / "d", documents_of(4), masks=[[True] * 4])
    dataset = TokenDataset.open(folder)
    first = dataset.sequence(0)
    first.input_ids[:] = 0
    first.is_target[:] = False
    again = dataset.sequence(0)
    assert again.input_ids.tolist() == [0, 1, 2, 3]
    assert again.is_target.tolist() == [False, True, True, True]


def test_empty_documents_are_refused_or_dropped(tmp_path):
    folder = write_documents(tmp_path / "d", [[1, 2], [], None, [3]])
    with pytest.raises(InputError, match=r"sequence 1 has 0 tokens; expected at least 1\. Drop empty documents or set"):
        TokenDataset.open(folder)
    dataset = TokenDataset.open(folder, drop_empty=True)
    assert dataset.sequence_lengths.tolist() == [2, 1]
    assert dataset.sequence(1).input_ids.tolist() == [3]


def test_only_empty_documents_is_an_error(tmp_path):
    folder = write_documents(tmp_path / "d", [[], []])
    with pytest.raises(InputError, match="every document has 0 tokens"):
        TokenDataset.open(folder, drop_empty=True)


def test_missing_path_and_missing_parquet_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing does not exist; .* Correct data\.path"):
        TokenDataset.open(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"has no \.parquet file; .* Run raysp prepare"):
        TokenDataset.open(tmp_path)


def test_no_rows_is_an_error(tmp_path):
    folder = write_documents(tmp_path / "d", [])
    with pytest.raises(InputError, match="has no document"):
        TokenDataset.open(folder)


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_corrupt_parquet_is_one_clear_line(tmp_path, damage):
    folder = write_documents(tmp_path / "d", documents_of(5, 6))
    file = folder / "data-00000.parquet"
    file.write_bytes({"text": b"no parquet at all", "truncated": file.read_bytes()[:-20], "empty": b""}[damage])
    with pytest.raises(InputError, match="expected a complete Parquet file") as caught:
        TokenDataset.open(folder)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_damaged_row_group_is_found_when_it_is_read(tmp_path):
    folder = write_documents(tmp_path / "d", [list(np.random.default_rng(0).integers(0, 2**30, 5000))])
    file = folder / "data-00000.parquet"
    content = bytearray(file.read_bytes())
    content[4:2000] = b"\xff" * 1996
    file.write_bytes(content)
    dataset = TokenDataset.open(folder)
    with pytest.raises(InputError, match=r"data-00000\.parquet"):
        dataset.sequence(0)


def test_wrong_columns_are_named(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no input_ids column \(it has text\)"):
        TokenDataset.open(tmp_path)
    pq.write_table(pa.table({"input_ids": [["a"]]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"column input_ids is list<.*string>; expected list<int>"):
        TokenDataset.open(tmp_path)
    pq.write_table(pa.table({"input_ids": [[1]], "length": ["1"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column length is string; expected int64"):
        TokenDataset.open(tmp_path)
    pq.write_table(pa.table({"input_ids": [[1]], "loss_mask": [[1]]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"column loss_mask is list<.*>; expected list<bool>"):
        TokenDataset.open(tmp_path)


def test_length_column_that_lies_is_found(tmp_path):
    pq.write_table(pa.table({"input_ids": [[1, 2], [3]], "length": [2, 2]}), tmp_path / "a.parquet")
    dataset = TokenDataset.open(tmp_path)
    with pytest.raises(InputError, match="row 1 has 1 input_ids, but its length says 2"):
        dataset.sequence(0)


def test_loss_mask_of_another_length_is_found(tmp_path):
    folder = write_documents(tmp_path / "d", [[1, 2]], masks=[[True]])
    with pytest.raises(InputError, match="row 0 has 2 input_ids, but its loss_mask says 1 values"):
        TokenDataset.open(folder).sequence(0)


@pytest.mark.parametrize("bad", [-1, 10, 5000])
def test_ids_outside_the_vocabulary_are_refused_at_the_start(tmp_path, bad):
    folder = write_documents(tmp_path / "d", [[1, 2], [9, bad]])
    (folder / "dataset.json").write_text(json.dumps({"vocab_size": 10}))
    with pytest.raises(InputError, match=rf"token id {bad}; expected 0 to 9 \(vocabulary of 10\)"):
        TokenDataset.open(folder)


def test_ids_are_checked_when_read_where_the_file_has_no_statistics(tmp_path):
    table = pa.table({"input_ids": [[1, 2], [9, 10]]})
    pq.write_table(table, tmp_path / "a.parquet", write_statistics=False)
    (tmp_path / "dataset.json").write_text(json.dumps({"vocab_size": 10}))
    dataset = TokenDataset.open(tmp_path)
    assert dataset.max_token_id is None
    with pytest.raises(InputError, match="token id 10; expected 0 to 9"):
        dataset.sequence(0)


def test_a_models_vocabulary_can_be_checked(tmp_path):
    dataset = TokenDataset.open(write_documents(tmp_path / "d", [[1, 2], [9]]))
    assert dataset.max_token_id == 9
    assert dataset.vocab_size is None
    dataset.check_vocab_size(10)
    with pytest.raises(InputError, match="token id 9; expected 0 to 8"):
        dataset.check_vocab_size(9)


def test_split_keeps_documents_whole_and_depends_on_its_arguments_alone(tmp_path):
    folder = write_documents(tmp_path / "d", documents_of(*range(1, 41)))
    whole, pieces = TokenDataset.open(folder), TokenDataset.open(folder, max_length=7)
    train, validation = pieces.split(0.25, seed=3)
    assert sorted([*train, *validation]) == list(range(pieces.num_sequences))
    held_out = {pieces.document_of(index) for index in validation}
    assert len(held_out) == 10
    assert held_out.isdisjoint({pieces.document_of(index) for index in train})
    assert held_out == set(whole.split(0.25, seed=3)[1].tolist())
    assert held_out != set(whole.split(0.25, seed=4)[1].tolist())


def test_split_keeps_at_least_one_document_on_each_side(tmp_path):
    dataset = TokenDataset.open(write_documents(tmp_path / "d", documents_of(3, 3, 3)))
    assert [len(ids) for ids in dataset.split(0.0, seed=0)] == [3, 0]
    assert [len(ids) for ids in dataset.split(0.001, seed=0)] == [2, 1]
    assert [len(ids) for ids in dataset.split(0.999, seed=0)] == [1, 2]
    with pytest.raises(InputError, match="expected 0 or more and less than 1"):
        dataset.split(1.0, seed=0)
    single = TokenDataset.open(write_documents(tmp_path / "e", documents_of(3)))
    with pytest.raises(InputError, match="1 document cannot be divided"):
        single.split(0.5, seed=0)


def test_split_is_the_same_on_every_machine(tmp_path):
    dataset = TokenDataset.open(write_documents(tmp_path / "d", documents_of(*[1] * 20)))
    assert dataset.split(0.2, seed=0)[1].tolist() == [2, 9, 16, 18]


def test_fingerprint_changes_with_the_data_and_the_pieces_only(tmp_path):
    documents = documents_of(5, 9)
    folder = write_documents(tmp_path / "d", documents)
    fingerprint = TokenDataset.open(folder).fingerprint
    assert fingerprint == TokenDataset.open(folder, max_length=100).fingerprint
    assert fingerprint != TokenDataset.open(folder, max_length=4).fingerprint
    folder.rename(tmp_path / "moved")
    assert fingerprint == TokenDataset.open(tmp_path / "moved").fingerprint
    documents[0][0] = 77
    assert fingerprint != TokenDataset.open(write_documents(tmp_path / "e", documents)).fingerprint


_READER = """
import json, sys
from raysp.data.dataset import TokenDataset
folder, ids = sys.argv[1], json.loads(sys.argv[2])
dataset = TokenDataset.open(folder)
print(json.dumps([int(dataset.sequence(index).input_ids.sum()) for index in ids]))
"""


def test_processes_read_at_the_same_time(tmp_path):
    documents = documents_of(*[20] * 50)
    folder = write_documents(tmp_path / "d", documents)
    orders = [np.random.default_rng(seed).permutation(50).tolist() for seed in range(2)]
    readers = [
        subprocess.Popen([sys.executable, "-c", _READER, folder, json.dumps(order)], stdout=subprocess.PIPE)
        for order in orders
    ]
    results = [json.loads(reader.communicate(timeout=120)[0]) for reader in readers]
    assert results == [[sum(documents[index]) for index in order] for order in orders]


def test_threads_read_at_the_same_time(tmp_path):
    documents = documents_of(*[20] * 50)
    dataset = TokenDataset.open(write_documents(tmp_path / "d", documents))
    order = np.random.default_rng(0).integers(0, 50, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda index: int(dataset.sequence(index).input_ids.sum()), order))
    assert sums == [sum(documents[index]) for index in order]


def test_ids_out_of_range_are_refused(tmp_path):
    dataset = TokenDataset.open(write_documents(tmp_path / "d", documents_of(3, 3)))
    for index in (-1, 2):
        with pytest.raises(InputError, match=f"sequence {index} does not exist; expected 0 to 1"):
            dataset.sequence(index)


def test_max_length_below_one_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.max_length is 0; expected at least 1"):
        TokenDataset.open(write_documents(tmp_path / "d", documents_of(3)), max_length=0)
