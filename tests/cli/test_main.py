"""The command line: exit statuses and what is printed where."""

import pytest

import slm_jax
from slm_jax.cli.main import main


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "did you mean 'train'"),
        (["train"], "--gin_file"),
        (["train", "--gin_fil", "x", "--gin_file", "runs/train.gin"], "did you mean '--gin_file'"),
        (["train", "--gin_file", "runs/nothing.gin"], "runs/nothing.gin"),
        (["train", "--gin_file", "x", "--skip_steps", "2"], "--skip_steps is 2, expected --rollback_to STEP"),
        (["train", "--gin_file", "x", "--rollback_to", "0"], "--rollback_to is 0, expected a whole number"),
        (["train", "--gin_file", "runs/train.gin", "--profile_steps", "9"], "--profile_steps is '9'"),
        (["train", "--gin_file", "runs/train.gin", "--profile_steps", "4:3"], "such as 100:105"),
        (
            ["train", "--gin_file", "runs/train.gin", "--dry_run", "--profile_steps", "1:2"],
            "--dry_run trains nothing, so --profile_steps",
        ),
        (
            ["train", "--gin_file", "runs/train.gin", "--dry_run", "--rollback_to", "3"],
            "--dry_run trains nothing, so --rollback_to",
        ),
        (["infer", "--run", "nowhere", "--audio", "a.wav"], "--prompt"),
        (["infer", "--run", "nowhere", "--audio", "a.wav", "--prompt", "x"], "nowhere"),
        (["infer", "--run", "nowhere", "--manifest", "m.jsonl", "--prompt", "x"], "--output"),
        (["demo", "--to", "x", "--gin.A=1"], "reads no gin"),
        (["quickstart", "--foundation", "nowhere"], "nowhere"),
        (["quickstart", "--steps", "0"], "--steps"),
        (["evaluate", "--run", "x", "--speech_as", "transcripts"], "did you mean 'transcript'"),
        (["export", "--run", "nowhere", "--to", "x"], "nowhere"),
        (["export", "--run", "nowhere", "--to", "x", "--audio", "a.wav"], "--prompt"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("slm: error: ")
    assert err.count("\n") == 1
    assert told in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["infer", "--help"]])
def test_help_is_status_0(words, capsys):
    with pytest.raises(SystemExit) as exited:
        main(words)
    assert exited.value.code == 0
    assert "usage: slm" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert slm_jax.__version__ in capsys.readouterr().out
