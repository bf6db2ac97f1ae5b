import gzip
import json
import os
import stat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from raysp.data.dataset import TokenDataset
from raysp.data.prepare import prepare
from raysp.data.writer import ROW_GROUP_TOKENS
from raysp.errors import InputError, RayspError

VOCAB_SIZE = 300


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts_of(output):
    dataset = TokenDataset.open(output)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    return [
        tokenizer.decode(dataset.sequence(index).input_ids.tolist(), skip_special_tokens=False)
        for index in range(dataset.num_sequences)
    ]


def sources_of(output):
    return pq.read_table(output / "data-00000.parquet", columns=["source"]).column("source").to_pylist()


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_folder_of_text_becomes_a_dataset_that_decodes_to_the_files(tmp_path):
    source = write_files(tmp_path / "in", {"b.py": "x = 1\n", "a/c.py": "def f():\n\treturn 'ä'\n", "z.txt": "no"})
    done = prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE, include=["*.py"])
    assert texts_of(tmp_path / "out") == ["def f():\n\treturn 'ä'\n<|endoftext|>", "x = 1\n<|endoftext|>"]
    assert sources_of(tmp_path / "out") == ["a/c.py", "b.py"]
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info == done.info
    dataset = TokenDataset.open(tmp_path / "out")
    assert (info["documents"], info["tokens"]) == (2, dataset.num_tokens)
    assert dataset.vocab_size == info["vocab_size"] <= VOCAB_SIZE
    schema = pq.read_schema(tmp_path / "out" / "data-00000.parquet")
    assert str(schema.field("input_ids").type).endswith("int32>")
    assert str(schema.field("length").type) == "int64"
    assert "loss_mask" not in schema.names


def test_same_input_gives_the_same_bytes(tmp_path):
    source = write_files(tmp_path / "in", {f"{n}.txt": f"number {n} of many words " * n for n in range(1, 40)})
    for name in ("one", "two"):
        prepare(source, tmp_path / name, train_tokenizer=400)
    for file in ("data-00000.parquet", "tokenizer/tokenizer.json", "dataset.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_include_and_exclude_match_names_paths_and_folders(tmp_path):
    names = ["a.py", "b.txt", "pkg/c.py", "pkg/skip/d.py", "site-packages/e.py", ".git/f.py", "pkg/g_test.py"]
    source = write_files(tmp_path / "in", dict.fromkeys(names, "some text"))
    prepare(
        source,
        tmp_path / "out",
        train_tokenizer=VOCAB_SIZE,
        include=["*.py"],
        exclude=["site-packages", "pkg/skip", "*_test.py"],
    )
    assert sources_of(tmp_path / "out") == ["a.py", "pkg/c.py"]


def test_what_cannot_be_used_is_counted_and_left_out(tmp_path):
    files = {
        "bin.dat": b"ab\0cd",
        "empty.txt": "",
        "good.txt": "good",
        "latin.txt": "caf\xe9".encode("latin-1"),
        "white.txt": " \n",
        "bom.txt": b"\xef\xbb\xbfbom",
    }
    source = write_files(tmp_path / "in", files)
    done = prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    assert texts_of(tmp_path / "out") == ["bom<|endoftext|>", "good<|endoftext|>"]
    assert done.info["left_out"] == {
        "unreadable_files": 0,
        "binary_files": 1,
        "undecodable_files": 1,
        "invalid_rows": 0,
        "empty_documents": 2,
    }
    assert done.examples["undecodable_files"] == "latin.txt"


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path):
    source = write_files(tmp_path / "in", {"a": b"\0", "b": ""})
    with pytest.raises(InputError, match=r"no document in 2 files can be used \(1 binary files, 1 empty documents\)"):
        prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.ndjson"])
def test_json_lines_rows_are_documents_and_bad_ones_are_counted(tmp_path, name):
    rows = [{"text": "one"}, "{broken", {"text": 5}, "[1]", "", {"text": ""}, {"text": "two", "other": 1}]
    done = prepare(write_jsonl(tmp_path / name, rows), tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    assert texts_of(tmp_path / "out") == ["one<|endoftext|>", "two<|endoftext|>"]
    assert done.info["left_out"]["invalid_rows"] == 3
    assert done.info["left_out"]["empty_documents"] == 1


def test_truncated_gzip_keeps_what_came_before(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl.gz", [{"text": f"{n} {os.urandom(200).hex()}"} for n in range(500)])
    path.write_bytes(path.read_bytes()[:-5000])
    done = prepare(path, tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    assert 0 < done.info["documents"] < 500
    assert done.info["left_out"]["unreadable_files"] == 1


def test_parquet_text_and_another_column_name(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"body": ["one", None, "two"]}), tmp_path / "in" / "x.parquet")
    with pytest.raises(InputError, match=r"columns body; expected text, input_ids or messages\. .*--text-column"):
        prepare(tmp_path / "in", tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    done = prepare(tmp_path / "in", tmp_path / "out", train_tokenizer=VOCAB_SIZE, text_column="body")
    assert texts_of(tmp_path / "out") == ["one<|endoftext|>", "two<|endoftext|>"]
    assert done.info["left_out"]["invalid_rows"] == 1


def test_damaged_parquet_is_an_error_while_training_and_while_tokenizing(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"text": ["fine"]}), source / "a.parquet")
    (source / "b.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(InputError, match=r"cannot read .*b\.parquet"):
        prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    assert os.listdir(tmp_path) == ["in"]


def test_ready_made_tokens_need_no_tokenizer_and_stay_as_they_are(tmp_path):
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": []}, {"input_ids": [1.5]}, {"input_ids": [2**40]}]
    done = prepare(write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "out")
    dataset = TokenDataset.open(tmp_path / "out")
    assert dataset.sequence(0).input_ids.tolist() == [5, 6, 7]
    assert (dataset.num_sequences, dataset.vocab_size, dataset.tokenizer_path) == (1, None, None)
    assert (done.info["left_out"]["empty_documents"], done.info["left_out"]["invalid_rows"]) == (1, 2)


def test_a_prepared_dataset_can_be_prepared_again_with_its_loss_mask(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    prepare(write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "one", train_tokenizer=VOCAB_SIZE)
    prepare(tmp_path / "one" / "data-00000.parquet", tmp_path / "two", tokenizer=tmp_path / "one" / "tokenizer")
    first, second = (TokenDataset.open(tmp_path / name).sequence(0) for name in ("one", "two"))
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.is_target.tolist() == second.is_target.tolist()


def test_only_what_the_assistant_says_and_its_end_are_targets(tmp_path):
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "say <|im_end|>"},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "because"},
    ]
    prepare(write_jsonl(tmp_path / "x.jsonl", [{"messages": chat}]), tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    dataset = TokenDataset.open(tmp_path / "out")
    sequence = dataset.sequence(0)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    whole = tokenizer.decode(sequence.input_ids.tolist(), skip_special_tokens=False)
    assert whole == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nsay <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n"
        "<|im_start|>assistant\nbecause<|im_end|>\n<|endoftext|>"
    )
    targets = tokenizer.decode(sequence.input_ids[sequence.is_target].tolist(), skip_special_tokens=False)
    assert targets == "no<|im_end|>because<|im_end|>"
    # What the user wrote is text: five messages, five end tokens.
    assert (sequence.input_ids == tokenizer.token_to_id("<|im_end|>")).sum() == 5


def test_control_tokens_in_a_text_are_text(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "x<|endoftext|>y"})
    prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    dataset = TokenDataset.open(tmp_path / "out")
    end = Tokenizer.from_file(str(dataset.tokenizer_path)).token_to_id("<|endoftext|>")
    assert np.flatnonzero(dataset.sequence(0).input_ids == end).tolist() == [dataset.num_tokens - 1]


def test_mixed_kinds_are_refused(tmp_path):
    source = tmp_path / "in"
    write_jsonl(source / "a.jsonl", [{"text": "one"}])
    write_jsonl(source / "b.jsonl", [{"input_ids": [1]}])
    with pytest.raises(InputError, match=r"b\.jsonl:1 holds input_ids, but the input began with text"):
        prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE)


def test_json_lines_beside_code_are_one_text_each_unless_asked_for(tmp_path):
    source = write_files(tmp_path / "in", {"a.py": "code"})
    write_jsonl(source / "b.jsonl", [{"text": "one"}, {"text": "two"}])
    assert prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE).info["documents"] == 2
    done = prepare(source, tmp_path / "rows", train_tokenizer=VOCAB_SIZE, include=["*.jsonl"])
    assert (done.info["settings"]["format"], done.info["documents"]) == ("jsonl", 2)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_given_tokenizer_is_used_and_kept(tmp_path, as_folder):
    source = write_files(tmp_path / "in", {"a.txt": "hello hello"})
    prepare(source, tmp_path / "one", train_tokenizer=VOCAB_SIZE)
    folder = tmp_path / "one" / "tokenizer"
    done = prepare(source, tmp_path / "two", tokenizer=folder if as_folder else folder / "tokenizer.json")
    assert texts_of(tmp_path / "two") == ["hello hello<|endoftext|>"]
    assert (
        done.info["tokenizer_sha256"] == json.loads((tmp_path / "one" / "dataset.json").read_text())["tokenizer_sha256"]
    )


def test_the_end_token_of_a_tokenizer_is_found_or_asked_for(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "hello"})
    prepare(source, tmp_path / "one", train_tokenizer=VOCAB_SIZE)
    text = (tmp_path / "one" / "tokenizer" / "tokenizer.json").read_text().replace("<|endoftext|>", "<|fin|>")
    write_files(tmp_path / "tok", {"tokenizer.json": text})
    with pytest.raises(InputError, match=r"no token to end a document \(looked for .*</s>.*--end-token"):
        prepare(source, tmp_path / "two", tokenizer=tmp_path / "tok")
    prepare(source, tmp_path / "two", tokenizer=tmp_path / "tok", end_token="<|fin|>")
    write_files(tmp_path / "tok", {"tokenizer_config.json": json.dumps({"eos_token": {"content": "<|fin|>"}})})
    prepare(source, tmp_path / "three", tokenizer=tmp_path / "tok")
    assert texts_of(tmp_path / "two") == texts_of(tmp_path / "three") == ["hello<|fin|>"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no tokenizer is given; expected --tokenizer PATH .* or --train-tokenizer"),
        ({"train_tokenizer": 100}, "--train-tokenizer 100 is too small; expected at least 259"),
        ({"tokenizer": "nowhere"}, r"nowhere has no tokenizer\.json; .* Names are not downloaded"),
        ({"train_tokenizer": 300, "include": ["*.md"]}, r"has no file that matches \*\.md"),
        ({"train_tokenizer": 300, "input_format": "parquet"}, "expected a complete Parquet file"),
    ],
)
def test_bad_settings_are_refused(tmp_path, options, message):
    source = write_files(tmp_path / "in", {"a.txt": "hello"})
    with pytest.raises(InputError, match=message):
        prepare(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_tokenizer_and_training_exclude_each_other(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "hello"})
    prepare(source, tmp_path / "one", train_tokenizer=VOCAB_SIZE)
    with pytest.raises(InputError, match="exclude each other"):
        prepare(source, tmp_path / "two", tokenizer=tmp_path / "one" / "tokenizer", train_tokenizer=VOCAB_SIZE)


def test_broken_tokenizer_file_is_refused(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "hello", "t.json": "{}"})
    with pytest.raises(InputError, match=r"cannot read .*t\.json.*expected a tokenizers JSON file"):
        prepare(source, tmp_path / "out", tokenizer=source / "t.json")


def test_missing_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist; expected a folder or a file"):
        prepare(tmp_path / "nothing", tmp_path / "out", train_tokenizer=VOCAB_SIZE)


def test_prepared_before_does_nothing_until_something_changes(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "hello"})
    output = tmp_path / "out"
    assert not prepare(source, output, train_tokenizer=VOCAB_SIZE).already_prepared
    written = (output / "data-00000.parquet").stat().st_mtime_ns
    again = prepare(source, output, train_tokenizer=VOCAB_SIZE)
    assert again.already_prepared
    assert again.info["documents"] == 1
    assert (output / "data-00000.parquet").stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"already holds a dataset made from other input or settings; .*--overwrite"):
        prepare(source, output, train_tokenizer=VOCAB_SIZE + 1)
    write_files(source, {"b.txt": "more"})
    with pytest.raises(InputError, match="--overwrite"):
        prepare(source, output, train_tokenizer=VOCAB_SIZE)
    assert prepare(source, output, train_tokenizer=VOCAB_SIZE, overwrite=True).info["documents"] == 2
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_folder_that_raysp_did_not_write_is_never_replaced(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "hello"})
    output = write_files(tmp_path / "out", {"thesis.doc": "years of work"})
    with pytest.raises(InputError, match="raysp did not write it"):
        prepare(source, output, train_tokenizer=VOCAB_SIZE, overwrite=True)
    assert (output / "thesis.doc").read_text() == "years of work"
    with pytest.raises(InputError, match="is not a folder"):
        prepare(source, output / "thesis.doc", train_tokenizer=VOCAB_SIZE, overwrite=True)


def test_input_inside_the_output_is_refused(tmp_path):
    source = write_files(tmp_path / "out" / "in", {"a.txt": "hello"})
    for output in (tmp_path / "out", source):
        with pytest.raises(InputError, match="lies inside the output"):
            prepare(source, output, train_tokenizer=VOCAB_SIZE, overwrite=True)


def test_output_inside_the_input_is_not_read_as_input(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "hello"})
    prepare(source, source / "out", train_tokenizer=VOCAB_SIZE)
    assert prepare(source, source / "out", train_tokenizer=VOCAB_SIZE).already_prepared


def test_an_error_while_writing_leaves_the_old_dataset(tmp_path):
    source = tmp_path / "x.jsonl"
    write_jsonl(source, [{"text": "hello"}])
    prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    before = (tmp_path / "out" / "dataset.json").read_bytes()
    write_jsonl(source, [{"input_ids": [3]}, {"input_ids": [1], "loss_mask": [True]}])
    with pytest.raises(InputError, match="began with input_ids"):
        prepare(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "dataset.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["out", "x.jsonl"]


def test_a_place_that_cannot_be_written_is_failed_work(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "hello"})
    with pytest.raises(RayspError, match=r"cannot write .*expected a place with room") as caught:
        prepare(source, tmp_path / "in" / "a.txt" / "out", train_tokenizer=VOCAB_SIZE)
    assert caught.value.exit_code == 1


def test_row_groups_are_small_and_a_long_document_is_alone_in_one(tmp_path):
    half = list(range(ROW_GROUP_TOKENS // 2))
    long = list(range(ROW_GROUP_TOKENS + 1))
    rows = [{"input_ids": ids} for ids in (half, half, half, long, [1])]
    prepare(write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "out")
    metadata = pq.read_metadata(tmp_path / "out" / "data-00000.parquet")
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [2, 1, 1, 1]
    dataset = TokenDataset.open(tmp_path / "out")
    assert dataset.sequence(3).input_ids.tolist() == long
    assert dataset.sequence(4).input_ids.tolist() == [1]


def test_ids_above_the_given_tokenizers_are_refused(tmp_path):
    prepare(write_files(tmp_path / "in", {"a.txt": "hello"}), tmp_path / "one", train_tokenizer=VOCAB_SIZE)
    rows = write_jsonl(tmp_path / "x.jsonl", [{"input_ids": [5, 100_000]}])
    with pytest.raises(InputError, match="token id 100000, but the tokenizer"):
        prepare(rows, tmp_path / "two", tokenizer=tmp_path / "one" / "tokenizer")
    assert not (tmp_path / "two").exists()


def test_a_very_long_text_is_encoded_in_parts_without_losing_a_character(tmp_path):
    text = "".join(f"line {number}\n" for number in range(150_000)) + "x" * 1_200_000
    prepare(write_files(tmp_path / "in", {"a.txt": text}), tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    assert texts_of(tmp_path / "out") == [text + "<|endoftext|>"]


def test_training_takes_an_even_sample_of_large_input(tmp_path):
    files = {f"{number:03d}.txt": f"{chr(97 + number // 25)}" * 100 for number in range(200)}
    source = write_files(tmp_path / "in", files)
    prepare(source, tmp_path / "out", train_tokenizer=1000, training_sample_bytes=2000)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json"))
    # Every part of the input was seen: each letter has merges of its own.
    assert {token[0] for token in tokenizer.get_vocab() if len(token) > 1 and token[0] in "abcdefgh"} == set("abcdefgh")


def test_progress_ends_at_the_whole_input(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "hello", "b.txt": "world"})
    seen = []
    prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE, progress=seen.append)
    assert {now.stage for now in seen} == {"training the tokenizer", "tokenizing"}
    last = seen[-1]
    assert (last.done_bytes, last.total_bytes, last.num_documents) == (10, 10, 2)


def test_others_may_read_the_output_as_the_umask_says(tmp_path):
    source = write_files(tmp_path / "in", {"a.txt": "hello"})
    prepare(source, tmp_path / "out", train_tokenizer=VOCAB_SIZE)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE(source.stat().st_mode)
