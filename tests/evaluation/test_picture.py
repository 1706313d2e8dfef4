"""The picture of a run, from the files that the training loop's own writers leave."""

import json

import numpy as np
import pytest
from clu import metric_writers

from slm_jax.errors import UserError
from slm_jax.evaluation import picture


@pytest.fixture
def run(tmp_path, rng):
    """A run that was killed after step 60 and went on from step 40."""
    loss = {step: float(rng.uniform(1, 5)) for step in range(1, 101)}
    (tmp_path / "steps.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": value}) + "\n" for step, value in loss.items())
    )
    written = {}
    for steps in ((20, 40, 60), (60, 80, 100)):
        writer = metric_writers.SummaryWriter(str(tmp_path / "tensorboard"))
        for step in steps:
            written[step] = float(rng.uniform(0, 100))
            writer.write_scalars(step, {"eval/asr/wer": written[step], "train/loss": 1.0})
        writer.close()
    return tmp_path, loss, written


def test_what_a_run_wrote_is_read_back_each_step_once(run):
    folder, loss, written = run
    assert dict(picture.losses(folder)) == loss
    scores = picture.scores(folder)
    assert list(scores) == ["asr/wer"]
    assert [step for step, _ in scores["asr/wer"]] == [20, 40, 60, 80, 100]
    np.testing.assert_allclose([value for _, value in scores["asr/wer"]], list(written.values()), rtol=1e-6)


def test_the_picture_is_an_image_and_replaced_as_a_whole(run, tmp_path):
    from matplotlib.image import imread

    folder, _, _ = run
    panels = [picture.Panel("WER", {"asr": "asr/wer", "never measured": "x/y"}, {"asr": 3.0}, 100)]
    target = tmp_path / "curves.png"
    for _ in range(2):
        picture.draw(target, picture.losses(folder), picture.scores(folder), panels, "a run")
    pixels = imread(target)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 500
    # Something is drawn in each half, and most of it is background.
    for half in np.array_split(pixels[..., :3].min(axis=-1), 2, axis=1):
        assert 0.005 < np.mean(half < 0.9) < 0.3
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"steps\.jsonl cannot be read"):
        picture.losses(tmp_path)
