"""The training command's words: what it takes, what it explains, and how soon it says what is mistyped."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import command_line, config
from launch.config import COMMAND, Config
from yafsdp_like.models import PRESETS

ROOT = Path(__file__).parents[2]
# Runs the command where torch cannot be imported.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv[0] = "launch.train"
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


def without_torch(*arguments: str, rank: int = 0) -> "subprocess.CompletedProcess[str]":
    """The command's answer, as one of two ranks, where torch is not to be had."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


# --- values ---


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        (["--data.paths=book.txt"], ("book.txt",)),
        (["--data.paths", "my book.txt"], ("my book.txt",)),
        (["--data.paths=1984.txt"], ("1984.txt",)),
        (["--data.paths=*.jsonl"], ("*.jsonl",)),
        (["--data.paths=it's: a # book.txt"], ("it's: a # book.txt",)),
        (["--data.paths=a.txt", "--num_steps=3", "--data.paths=b.txt"], ("a.txt", "b.txt")),
        (["--data.paths=a.txt", "--data.paths=[b.txt, c.txt]"], ("b.txt", "c.txt")),
        (["--data.paths=['b.txt']"], ("b.txt",)),
        (["--data.paths=[]"], ()),
    ],
)
def test_paths_need_no_brackets(arguments: list[str], paths: tuple[str, ...]) -> None:
    assert config.load(arguments).data.paths == paths


@pytest.mark.parametrize("written", ["one.txt", "[one.txt]", "\n  - one.txt"])
def test_a_path_in_a_file_needs_none_either(tmp_path: Path, written: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"data:\n  paths: {written}\n")
    options = config.load([str(file)])
    assert options.data.paths == ("one.txt",)
    assert command_line.as_dict(options)["data"]["paths"] == ["one.txt"]


def test_a_pair_of_numbers_needs_no_brackets() -> None:
    assert config.load(["--optimizer.betas=0.8,0.9"]).optimizer.betas == (0.8, 0.9)
    assert config.load(["--optimizer.betas", "[0.8, 0.9]"]).optimizer.betas == (0.8, 0.9)


def test_a_key_without_a_value_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"--num_steps has no value: say --num_steps=VALUE"):
        config.load(["--num_steps"])


def test_a_factorys_arguments_are_its_own() -> None:
    factory = ["--model.preset=null", "--model.factory=a:b"]
    options = config.load([*factory, "--model.factory_args.width=256", "--model.factory_args.act=gelu"])
    assert options.model.factory_args == {"width": 256, "act": "gelu"}


@pytest.mark.parametrize("content", ["", "# nothing is said\n", "{}\n"])
def test_an_empty_file_says_that_all_is_as_by_default(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert config.load([str(tmp_path / "config.yaml")]) == Config()


@pytest.mark.parametrize(("num_ranks", "num_accumulated"), [(1, 4), (2, 2), (4, 1), (8, 1), (16, 1), (32, 1)])
def test_the_default_batch_is_split_over_any_ranks_that_it_can_be(num_ranks: int, num_accumulated: int) -> None:
    assert Config().num_accumulated(num_ranks) == num_accumulated


@pytest.mark.parametrize(
    ("global_batch_size", "num_ranks", "num_accumulated"), [(36, 1, 6), (17, 1, 17), (24, 2, 2), (26, 2, 13)]
)
def test_a_forward_takes_the_most_sequences_up_to_eight_that_divide(
    global_batch_size: int, num_ranks: int, num_accumulated: int
) -> None:
    assert Config(global_batch_size=global_batch_size).num_accumulated(num_ranks) == num_accumulated


def test_a_batch_that_ranks_cannot_share_says_which_would_do() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size 32 does not divide by 3 ranks; make it 33, say"):
        Config().num_accumulated(3)
    with pytest.raises(ValueError, match=r"global_batch_size 4 does not divide by 8 ranks; make it 8, say"):
        Config(global_batch_size=4).num_accumulated(8)


# --- words ---


def test_help_names_every_key_with_its_type_and_default() -> None:
    words = without_torch("--help")
    assert (words.returncode, words.stderr) == (0, "")
    assert words.stdout.rstrip("\n") == COMMAND.help_text()
    said = dict(re.findall(r"^  --([\w.]+)=(.*?\(default: .*?\))", words.stdout, re.MULTILINE))
    assert said["optimizer.lr"] == "float (default: 0.0003)"
    assert said["optimizer.betas"] == "[float,float] (default: [0.9, 0.95])"
    assert said["device"] == "auto|cpu|cuda (default: auto)"
    assert said["data.paths"] == "str|[str,...] (default: [])"
    assert said["model.hf_dir"] == "str|null (default: null)"
    leaves = [key for key, hint in command_line.known_keys(Config) if not dataclasses.is_dataclass(hint)]
    assert [key.removesuffix(".KEY") for key in said] == leaves
    assert "the last complete checkpoint" in words.stdout  # what stands beside a key in the code
    assert max(map(len, words.stdout.splitlines())) <= 120


def test_help_names_every_preset() -> None:
    (named,) = re.findall(r"--model\.preset\S+ \(default: \w+\)(.*)", COMMAND.help_text())
    assert set(re.findall(r"[\w.-]+", named.replace(" or ", " "))) == set(PRESETS)


def test_what_would_be_run_is_printed_on_demand_and_runs(tmp_path: Path) -> None:
    words = without_torch("configs/tiny.yaml", "--print_config", "--num_steps=7", "--optimizer.lr=1e-3")
    assert words.returncode == 0, words.stderr
    (tmp_path / "again.yaml").write_text(words.stdout)
    again = config.load([str(tmp_path / "again.yaml")])
    assert again == config.load([str(ROOT / "configs" / "tiny.yaml"), "--num_steps=7", "--optimizer.lr=1e-3"])
    assert list(yaml.safe_load(words.stdout))[:2] == ["output_dir", "resume"]  # in the order of the help


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/tiny.yaml", "--num_stepz=1"], "unknown key 'num_stepz' in the command line; did you mean"),
        (["configs/tiny.yaml", "--num_steps=many"], "num_steps in the command line: expected int, found many"),
        (
            ["configs/tiny.yaml", "--micro_batch_size=x"],
            "micro_batch_size in the command line: expected int|null, found",
        ),
        (["configs/tiny.yaml", "--device=gpu"], "device in the command line: expected auto|cpu|cuda, found gpu"),
        (["configs/tiny.yaml", "--optimizer.betas=0.9"], "betas in the command line: expected [float,float], found"),
        (["configs/tiny.yaml", "--micro_batch_size=3"], "not a multiple of micro_batch_size 3 × 2 ranks = 6"),
        (["configs/tiny.yaml", "--data.paths=nowhere.txt"], "nowhere.txt does not exist"),
        (["configs/tyni.yaml"], "cannot read the configuration configs/tyni.yaml"),
        ([], "no arguments; usage: "),
    ],
)
def test_a_mistake_is_one_line_before_torch_is_imported(arguments: list[str], message: str) -> None:
    words = without_torch(*arguments)
    assert words.returncode == 1 and words.stdout == ""
    (line,) = words.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_wrong_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optimizer:\n  lr: fast\n")
    with pytest.raises(ValueError, match=r"^optimizer\.lr in \S+run\.yaml: expected float, found fast$"):
        config.load([str(tmp_path / "run.yaml"), "--num_steps=3"])


def test_help_says_something_of_every_key() -> None:
    for section in (Config, *command_line.sections(Config).values()):
        options = {f.name for f in dataclasses.fields(section)} - set(command_line.sections(section))
        assert options <= set(command_line._comments(section)), section


def test_the_first_rank_speaks_and_others_wait_to_be_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is not ended may be on a host that lacks what the first one has: it has its say, and its rank."""
    slept: list[float] = []
    monkeypatch.setattr(command_line.time, "sleep", slept.append)
    mistaken = ["configs/tiny.yaml", "--num_stepz=1"]
    monkeypatch.setenv("RANK", "1")
    assert COMMAND.answer(["--help"]) == 0
    assert capsys.readouterr() == ("", "") and slept == []
    assert COMMAND.answer(mistaken) == 1
    assert capsys.readouterr().err.endswith("did you mean 'num_steps'? (rank 1)\n") and slept == [5.0]
    monkeypatch.setenv("RANK", "0")
    assert COMMAND.answer(mistaken) == 1
    assert capsys.readouterr().err.endswith("did you mean 'num_steps'?\n") and slept == [5.0]
    assert isinstance(COMMAND.answer(["configs/tiny.yaml", "--num_steps=1"]), Config)
    assert capsys.readouterr() == ("", "")


# --- files that are not what they should be ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("num_steps: null", "num_steps must not be null; without the key it has its default"),
        ("output_dir:\nseed: 1", "output_dir must not be null; without the key it has its default"),
        ("optimizer: {lr: ~}", "optimizer.lr must not be null; without the key it has its default"),
        ("model: {overrides: null}", "model.overrides must not be null; without the key it has its default"),
        ("optimizer: 5", "the section optimizer must hold keys and values, found int"),
        ("optimizer: [1]", "the section optimizer must hold keys and values, found list"),
        ("checkpoint: {grace_seconds: .nan}", "checkpoint.grace_seconds must be a number of seconds, got nan"),
        ("sample: {temperature: -1}", "sample.temperature must be at least 0, got -1.0"),
        ("seed: 99999999999999999999", "seed must have at most 64 bits, got 99999999999999999999"),
        ('output_dir: ""', "output_dir must say a path, got ''"),
        ("model: {overrides: &it {vocab_size: *it}}", "nested too deeply"),
        ("num_steps: " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
        ("num_steps: 2\nnum_steps: 3", "is not YAML: the key 'num_steps' stands twice"),
        ("data: {paths: a, paths: b}", "is not YAML: the key 'paths' stands twice"),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        config.load([str(file)])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_section_whose_keys_are_all_comments_has_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optimizer:\n  # lr: 1\ndata:\n")
    assert config.load([str(file)]) == Config()
    assert config.load([str(file), "--optimizer.lr=0.5"]).optimizer.lr == 0.5


def test_a_rank_that_has_lost_another_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(_: Config) -> None:
        raise RuntimeError("the engine has failed") from RuntimeError("[pair.cc:537] Connection reset by peer.\nMore.")

    with pytest.raises(RuntimeError, match="the engine has failed"):  # alone there is no rank to lose
        command_line.exit_status(lose, Config())
    monkeypatch.setenv("RANK", "0")
    assert command_line.exit_status(lose, Config()) == 1
    said = "rank 0 lost another rank, which has ended or cannot be reached: [pair.cc:537] Connection reset by peer."
    assert capsys.readouterr().err == f"error: {said}\n"
