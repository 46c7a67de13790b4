"""The token cache: right ids at any split of the file, built once, never half, and clear about what is wrong."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset import token_cache, workers
from dataset.lm_dataset import parse_record, tokenize_records
from dataset.token_cache import TokenCache, open_token_cache
from dataset.tokenization import ChatTokenizer

ROOT = Path(__file__).resolve().parents[1]
KEYS = {"pretrain": "text", "conversation": "conversations"}


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(ROOT / "model")


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(data_path, kind="pretrain", **options):
        options = {"cache_dir": tmp_path / "cache", "num_workers": 1, "show_progress": False} | options
        return open_token_cache(data_path, tokenizer, kind, **options)

    return build


def make_records(kind, count=60):
    dice = random.Random(0)
    words = ["天空", "hello", "1+1=2", "\n", "🙂", "def f(x):", "<|im_end|>", " 山"]

    def text():
        return "文" + "".join(dice.choices(words, k=dice.randint(1, 40)))

    if kind == "pretrain":
        return [{"text": text()} for _ in range(count)]
    records = []
    for _ in range(count):
        prompt = [{"role": "user", "content": text()}]
        if kind == "conversation":
            answers = [{"role": "assistant", "content": text()}] + dice.randint(0, 2) * prompt
            records.append({"conversations": prompt + answers})
        else:
            sides = ("chosen", "rejected")
            records.append({s: [*prompt, {"role": "assistant", "content": s + text()}] for s in sides})
    return records


def write(path, records, newline="\n", prefix=b""):
    text = "".join(json.dumps(record, ensure_ascii=False) + newline for record in records)
    path.write_bytes(prefix + text.encode())
    return path


def assert_holds(cache, kind, records, tokenizer):
    parsed = [parse_record(kind, json.dumps(record)) for record in records]
    documents = tokenize_records(kind, parsed, tokenizer)
    assert cache.meta["documents"] == len(documents) and cache.meta["records"] == len(records)
    assert cache.offsets.tolist() == np.cumsum([0] + [len(ids) for ids, _ in documents]).tolist()
    assert cache.tokens.tolist() == [i for ids, _ in documents for i in ids]
    assert cache.tokens.dtype == np.uint16 and len(cache.tokens) == cache.meta["tokens"]
    if kind == "pretrain":
        assert cache.mask is None
    else:
        assert cache.mask.tolist() == [m for _, mask in documents for m in mask]


@pytest.mark.parametrize("kind", ["pretrain", "conversation", "preference"])
@pytest.mark.parametrize("range_bytes", [64, 1000, 1 << 20])
def test_any_split_of_the_file_gives_the_same_tokens(tmp_path, build, tokenizer, monkeypatch, kind, range_bytes):
    records = make_records(kind)
    data = write(tmp_path / "data.jsonl", records)
    monkeypatch.setattr(token_cache, "RANGE_BYTES", range_bytes)
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", 300)
    assert_holds(build(data, kind), kind, records, tokenizer)


def test_workers_give_the_same_tokens(tmp_path, build, tokenizer, monkeypatch):
    records = make_records("conversation")
    data = write(tmp_path / "data.jsonl", records)
    monkeypatch.setattr(token_cache, "RANGE_BYTES", 500)
    assert_holds(build(data, "conversation", num_workers=2), "conversation", records, tokenizer)


def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_line_end(tmp_path, build, tokenizer):
    records = make_records("pretrain", 9)
    data = write(tmp_path / "data.jsonl", records, "\r\n\r\n \r\n", prefix=b"\xef\xbb\xbf")
    with open(data, "ab") as file:
        file.write(b'{"text": "last"}')
    assert_holds(build(data), "pretrain", [*records, {"text": "last"}], tokenizer)


def test_one_line_longer_than_many_ranges(tmp_path, build, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "RANGE_BYTES", 1000)
    records = [{"text": "长" * 20_000}, {"text": "short"}]
    assert_holds(build(write(tmp_path / "data.jsonl", records)), "pretrain", records, tokenizer)


def test_meta_counts(tmp_path, build, tokenizer):
    cache = build(write(tmp_path / "data.jsonl", [{"text": "天a"}, {"text": "bc"}]))
    expected = {"documents": 2, "lines": 2, "records": 2, "skipped_lines": 0, "tokenizer_sha256": tokenizer.sha256}
    assert expected.items() <= cache.meta.items()


def test_a_warm_cache_is_opened_and_a_changed_file_or_kind_is_read_again(tmp_path, build, monkeypatch):
    data = write(tmp_path / "data.jsonl", make_records("pretrain", 3))
    first = build(data)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_write_cache", None)  # would fail if it were built again
        assert build(data).folder == first.folder
    os.utime(data, ns=(0, 123_456_789))
    assert build(data).folder != first.folder
    write(data, make_records("pretrain", 4))
    assert build(data).meta["documents"] == 4
    assert build(data, skip_bad_lines=True).folder != build(data).folder


def test_data_changed_behind_size_and_time_is_read_again(tmp_path, build):
    data = tmp_path / "data.jsonl"
    for text in ("first", "other"):
        data.write_text(json.dumps({"text": text}) + "\n")
        os.utime(data, ns=(0, 10**18))
        assert build(data).tokens.tolist() == build(data).tokens.tolist()
        assert ChatTokenizer(ROOT / "model").decode(build(data).tokens) == text


def test_another_chat_template_is_another_cache_of_conversations_alone(tmp_path, build, tokenizer):
    """The tokenizer is the same file; only how it writes a conversation differs."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "model" / name, tmp_path / name)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    other = ChatTokenizer(tmp_path)
    options = {"cache_dir": tmp_path / "cache", "num_workers": 1, "show_progress": False}
    for kind in ("pretrain", "conversation"):
        data = write(tmp_path / f"{kind}.jsonl", make_records(kind, 3))
        theirs, ours = open_token_cache(data, other, kind, **options), build(data, kind)
        assert (theirs.folder == ours.folder) == (kind == "pretrain")
        assert (theirs.contents_sha256 == ours.contents_sha256) == (kind == "pretrain")


@pytest.mark.parametrize("damage", ["tokens.bin", "offsets.bin", "meta.json"])
def test_a_damaged_cache_is_made_again(tmp_path, build, damage):
    data = write(tmp_path / "data.jsonl", make_records("pretrain", 3))
    cache = build(data)
    tokens = cache.tokens.tolist()
    file = cache.folder / damage
    os.truncate(file, file.stat().st_size - 2)
    assert build(data).tokens.tolist() == tokens


def test_a_cache_pickles_as_its_folder(tmp_path, build):
    cache = build(write(tmp_path / "data.jsonl", make_records("conversation", 50)), "conversation")
    raw = pickle.dumps(cache)
    assert len(raw) < 1000
    copy = pickle.loads(raw)
    assert copy.tokens.tolist() == cache.tokens.tolist() and copy.mask.tolist() == cache.mask.tolist()


def test_missing_file_names_the_flag_and_what_is_there(tmp_path, build):
    (tmp_path / "other.jsonl").touch()
    with pytest.raises(ValueError, match=r"none\.jsonl not found; .*--data_path .*holds: other\.jsonl"):
        build(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="the folder .*nowhere is not there either"):
        build(tmp_path / "nowhere" / "none.jsonl")


def test_a_folder_and_an_empty_file_are_refused(tmp_path, build):
    with pytest.raises(ValueError, match="is a folder; --data_path takes one jsonl file"):
        build(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        build(tmp_path / "empty.jsonl")
    (tmp_path / "blank.jsonl").write_text("\n \r\n\n")
    with pytest.raises(ValueError, match=r"blank\.jsonl holds no record"):
        build(tmp_path / "blank.jsonl")
    assert not list((tmp_path / "cache").glob("*/"))


def test_bad_lines_are_listed_with_file_and_line(tmp_path, build, monkeypatch):
    monkeypatch.setattr(token_cache, "RANGE_BYTES", 40)  # line numbers go on from range to range
    data = tmp_path / "data.jsonl"
    lines = [b'{"text": "good"}', b"", b'{"text": ""}', b'{"text": "good"}', b'{"tex', b'{"text": "\xff"}']
    data.write_bytes(b"\r\n".join(lines + [b"{}"] * 20))
    for num_workers in (1, 2):
        with pytest.raises(ValueError) as caught:
            build(data, num_workers=num_workers)
        message = str(caught.value)
        assert message.startswith(f"23 bad lines in {data}:")
        assert f'{data}:3: "text" is empty' in message
        assert f"{data}:5: broken JSON" in message
        assert f"{data}:6: not UTF-8 at byte 11" in message
        assert (
            f'{data}:7: key "text" is missing' in message and f"{data}:13:" in message and f"{data}:14:" not in message
        )
        assert "13 more" in message and "--skip_bad_lines" in message
    assert not list((tmp_path / "cache").glob("*/"))


def test_bad_lines_can_be_left_out_and_are_counted(tmp_path, build, tokenizer, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "good"}\n{"text": 1}\n{"text": "more"}\nx\n', encoding="utf-8")
    cache = build(data, skip_bad_lines=True, show_progress=True)
    assert_holds(cache, "pretrain", [{"text": "good"}, {"text": "more"}], tokenizer)
    assert cache.meta["skipped_lines"] == 2
    printed = capsys.readouterr().out
    assert "2 bad lines" in printed and f'{data}:2: "text" must be a string, not a number' in printed


def test_a_file_of_bad_lines_only_is_refused_even_when_they_are_left_out(tmp_path, build):
    data = tmp_path / "data.jsonl"
    data.write_text("x\ny\n")
    with pytest.raises(ValueError, match=r"holds no record: all 2 lines are bad(?s:.)*data\.jsonl:1: broken JSON"):
        build(data, skip_bad_lines=True)


def test_a_line_that_is_too_long_is_named_and_not_tokenized(tmp_path, build, tokenizer, monkeypatch):
    """Over several ranges, as the first line, as the last one without an end, and with white space before it."""
    monkeypatch.setattr(token_cache, "RANGE_BYTES", 300)
    fitting = {"text": "x" * (500 - len(json.dumps({"text": ""})))}
    long = json.dumps({"text": "x" * 2000})
    for number, place in ((1, 0), (3, 2), (5, 4)):
        lines = [json.dumps(fitting), '{"text": "a"}', json.dumps(fitting), '{"text": "b"}']
        lines.insert(place, long)
        data = tmp_path / f"{place}.jsonl"
        data.write_text("\n".join(lines), "utf-8")
        with pytest.raises(ValueError, match=f"1 bad line in (?s:.)*:{number}: longer than --max_record_bytes 500\n"):
            build(data, max_record_bytes=500)
        cache = build(data, max_record_bytes=500, skip_bad_lines=True)
        assert_holds(cache, "pretrain", [fitting, {"text": "a"}, fitting, {"text": "b"}], tokenizer)
        assert build(data, skip_bad_lines=True).meta["documents"] == 5
    data.write_text(" " * 2000 + '{"text": "a"}\n')
    with pytest.raises(ValueError, match="1: longer than --max_record_bytes 500"):
        build(data, max_record_bytes=500)


def test_a_file_of_another_layout_gets_the_command_that_converts_it(tmp_path, build):
    for record in (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ):
        data = write(tmp_path / "data.jsonl", [record] * 3)
        with pytest.raises(ValueError, match=f"prepare_data.py convert {data} --output"):
            build(data, "conversation")


def test_two_files_put_together_may_have_a_byte_order_mark_in_the_middle(tmp_path, build, tokenizer):
    records = make_records("pretrain", 6)
    first, second = (write(tmp_path / f"{n}.jsonl", records[n::2], prefix=b"\xef\xbb\xbf") for n in range(2))
    (tmp_path / "data.jsonl").write_bytes(first.read_bytes() + second.read_bytes())
    assert_holds(build(tmp_path / "data.jsonl"), "pretrain", records[::2] + records[1::2], tokenizer)


def test_keys_that_are_not_used_are_said(tmp_path, build, capsys):
    turns = [{"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "weight": 1}]
    data = write(tmp_path / "data.jsonl", [{"conversations": turns, "id": 3}] * 700)
    for _ in range(2):  # built, then opened
        build(data, "conversation", show_progress=True, num_workers=2)
        assert (
            f'{data}: these keys are not used: "weight" of turns (1,400), "id" of records (700)'
            in capsys.readouterr().out
        )


def with_template(folder, template):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "model" / name, folder / name)
    (folder / "chat_template.jinja").write_text(template)
    return ChatTokenizer(folder)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", ".*: roles must alternate"),
        ("{% for m in messages %}<|im_start|>{{ m.role[:2] }}\n{{ m.content }}<|im_end|>{% endfor %}", ".*no turn"),
    ],
)
def test_a_conversation_that_the_template_refuses_or_writes_without_answers_is_a_bad_line(tmp_path, template, reason):
    data = write(tmp_path / "data.jsonl", make_records("conversation", 3))
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(ValueError, match=f"{data}:1: the chat template of {reason}"):
        open_token_cache(data, tokenizer, "conversation", cache_dir=tmp_path, show_progress=False)


def test_an_answer_that_the_template_leaves_open_is_learned_without_an_end(tmp_path):
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}"
    tokenizer = with_template(tmp_path, "{% for m in messages %}" + turn + "{% endfor %}")
    question = {"role": "user", "content": "a"}
    records = [{"conversations": [question, {"role": "assistant", "content": "天地" * n}]} for n in (1, 2, 3)]
    data = write(tmp_path / "data.jsonl", records)
    cache = open_token_cache(data, tokenizer, "conversation", cache_dir=tmp_path, show_progress=False)
    assert_holds(cache, "conversation", records, tokenizer)
    for record, end in zip(records, cache.offsets[1:], strict=True):
        last = tokenizer.encode_contents([record["conversations"][-1]["content"]])[0]
        assert cache.tokens[end - len(last) : end].tolist() == last
        assert cache.mask[end - len(last) - 1 : end].tolist() == [0] + [1] * len(last)


def test_other_control_tokens_have_a_cache_of_their_own(tmp_path, build):
    data = write(tmp_path / "data.jsonl", make_records("pretrain", 3))
    other = with_template(tmp_path, "")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8")) | {"eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    ends = []
    for tokenizer in (other, ChatTokenizer(tmp_path)):
        cache = open_token_cache(data, tokenizer, "pretrain", cache_dir=tmp_path / "cache", show_progress=False)
        ends.append(int(cache.tokens[-1]))
    assert ends == [2, 0] and build(data).meta.keys() == cache.meta.keys() - {"control_tokens"}


def test_a_long_name_and_one_that_is_not_utf8_are_fine(tmp_path, build):
    for name in ("长" * 80 + ".jsonl", os.fsdecode(b"\xff\xfe.jsonl")):
        try:
            data = write(tmp_path / name, make_records("pretrain", 2))
        except OSError:  # not every file system takes every name
            continue
        assert build(data).folder == build(data).folder


def test_a_vocabulary_larger_than_16_bits_is_refused(tmp_path, tokenizer, monkeypatch):
    data = write(tmp_path / "data.jsonl", make_records("pretrain", 1))
    monkeypatch.setattr(tokenizer, "vocab_size", 65_537)
    with pytest.raises(ValueError, match=r"65,537 ids.*16 bits.*--tokenizer_path"):
        open_token_cache(data, tokenizer, "pretrain", cache_dir=tmp_path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, build, monkeypatch):
    data = write(tmp_path / "data.jsonl", make_records("pretrain", 3))
    read_range = token_cache.RangeReader.__call__

    def meanwhile(*arguments):
        with open(data, "a") as file:
            file.write('{"text": "more"}\n')
        return read_range(*arguments)

    monkeypatch.setattr(token_cache.RangeReader, "__call__", meanwhile)
    with pytest.raises(ValueError, match="changed while it was read"):
        build(data)


def test_a_full_disk_leaves_no_half_cache(tmp_path, build, tokenizer, monkeypatch):
    records = make_records("pretrain")
    data = write(tmp_path / "data.jsonl", records)
    monkeypatch.setattr(token_cache, "RANGE_BYTES", 1000)
    write_array, calls = token_cache.write_array, []

    def full(file, array):
        calls.append(file)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_array(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "write_array", full)
        with pytest.raises(ValueError, match="No space left on device; free some space there, .*--cache_dir"):
            build(data, num_workers=2)
    assert not list((tmp_path / "cache").glob("*/"))
    assert_holds(build(data), "pretrain", records, tokenizer)


def run_script(tmp_path, body, **options):
    """A process that has data.jsonl, the tokenizer and token_cache at hand."""
    code = (
        f"import sys, os, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from dataset import disk, token_cache, workers\n"
        "from dataset.tokenization import ChatTokenizer\n"
        f"tmp_path = Path({str(tmp_path)!r})\n"
        "token_cache.RANGE_BYTES = 1000\n"
        "def build(**options):\n"
        f"    tokenizer = ChatTokenizer({str(ROOT / 'model')!r})\n"
        "    options = dict(cache_dir=tmp_path / 'cache', num_workers=2) | options\n"
        "    return token_cache.open_token_cache(tmp_path / 'data.jsonl', tokenizer, 'pretrain', **options)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code + body], stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.skipif(os.name != "posix", reason="limits on file size are POSIX")
def test_a_write_that_the_system_refuses_is_a_clear_error(tmp_path):
    write(tmp_path / "data.jsonl", make_records("pretrain", 400))
    process = run_script(
        tmp_path,
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: build()\n"
        "except ValueError as error: print(error)\n",
    )
    message = process.communicate(timeout=60)[0]
    assert "cannot write the token cache" in message and "free some space" in message
    assert not list((tmp_path / "cache").glob("*/"))


def test_of_two_builders_one_builds_and_the_other_waits(tmp_path, tokenizer):
    records = make_records("pretrain")
    write(tmp_path / "data.jsonl", records)
    body = (
        "write = token_cache._write_cache\n"
        "def slow(*arguments):\n"
        "    with open(tmp_path / 'builds', 'a') as file: file.write('x')\n"
        "    write(*arguments)\n"
        "    deadline = time.monotonic() + 30\n"  # until the other one is at the lock
        "    while not (tmp_path / 'waits').exists() and time.monotonic() < deadline: time.sleep(0.01)\n"
        "token_cache._write_cache = slow\n"
        "acquire = disk.FileLock.acquire\n"
        "def noted(self, *a, **k):\n"
        "    if k.get('timeout') != 0: (tmp_path / 'waits').touch()\n"
        "    return acquire(self, *a, **k)\n"
        "disk.FileLock.acquire = noted\n"
        "print(build().folder)\n"
    )
    processes = [run_script(tmp_path, body) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert (tmp_path / "builds").read_text() == "x"
    assert sum("waiting for another process" in output for output in outputs) == 1
    folders = {output.split()[-1] for output in outputs}
    assert len(folders) == 1
    assert_holds(TokenCache(folders.pop()), "pretrain", records, tokenizer)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_a_killed_builder_leaves_nothing_to_trip_over(tmp_path, build, tokenizer, monkeypatch):
    records = make_records("pretrain", 200)
    data = write(tmp_path / "data.jsonl", records)
    builder = run_script(
        tmp_path,
        "start = workers._Worker.__init__\n"
        "def noted(self, *a):\n"
        "    start(self, *a)\n"
        "    print(self._process.pid, flush=True)\n"
        "workers._Worker.__init__ = noted\n"
        "write_array = token_cache.write_array\n"
        "def stuck(file, array):\n"
        "    write_array(file, array)\n"
        "    file.flush()\n"
        "    if file.tell() > 5000: print('half', flush=True); time.sleep(600)\n"
        "token_cache.write_array = stuck\n"
        "build(show_progress=False)\n",
    )
    lines = []
    while "half" not in lines:
        lines.append(builder.stdout.readline().strip())
        assert lines[-1], "the builder ended before it was half-way"
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    unfinished = list((tmp_path / "cache").glob("*.unfinished/tokens.bin"))
    assert unfinished and unfinished[0].stat().st_size > 5000
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in lines[:2]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in lines[:2])
    assert_holds(build(data), "pretrain", records, tokenizer)
    assert [path.suffix for path in (tmp_path / "cache").glob("*/")] == [""]


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path, build, monkeypatch):
    data = write(tmp_path / "data.jsonl", make_records("pretrain"))
    monkeypatch.setattr(token_cache, "RANGE_BYTES", 500)
    start = workers._Worker.__init__

    def short_lived(self, *arguments):
        start(self, *arguments)
        self._process.kill()

    monkeypatch.setattr(workers._Worker, "__init__", short_lived)
    with pytest.raises(ValueError, match="a worker process ended early"):
        build(data, num_workers=2)


def test_what_starts_with_python_may_print(tmp_path, build, tokenizer, monkeypatch):
    """Before a worker takes its standard output for results: lines, half lines and what looks like a result."""
    records = make_records("pretrain")
    data = write(tmp_path / "data.jsonl", records)
    (tmp_path / "sitecustomize.py").write_text("import os; os.write(1, b'hello\\n\\x80\\x04N.')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(token_cache, "RANGE_BYTES", 500)
    assert_holds(build(data, num_workers=2), "pretrain", records, tokenizer)


def test_workers_import_neither_torch_nor_transformers_nor_the_main_script(tmp_path):
    code = (
        f"import sys; sys.path[:1] = [{str(ROOT)!r}]; import dataset.token_cache, dataset.workers\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    # A script without a main guard, which multiprocessing's spawn would run again in each worker.
    write(tmp_path / "data.jsonl", make_records("pretrain"))
    process = run_script(tmp_path, "print('main')\nbuild(show_progress=False)\n")
    assert process.communicate(timeout=60)[0].split() == ["main"] and process.returncode == 0


def test_building_leaves_the_threads_setting_of_the_tokenizers_library_alone(tmp_path, build, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    build(write(tmp_path / "data.jsonl", make_records("pretrain", 2)))
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_contents_are_told_apart_wherever_the_file_lies(tmp_path, tokenizer):
    """A copy has the same hash, another target late in the file has not."""

    def turns(role: str) -> str:
        return json.dumps({"conversations": [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]}) + "\n"

    hashes = []
    for name, text in (("a", turns("assistant") * 9), ("copy", turns("assistant") * 9), ("b", turns("assistant") * 8)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text if name != "b" else text + turns("assistant").replace('"b"', '"c"'))
        cache = open_token_cache(path, tokenizer, "conversation", cache_dir=tmp_path / "cache", show_progress=False)
        hashes.append(cache.contents_sha256)
    assert hashes[0] == hashes[1] != hashes[2]
