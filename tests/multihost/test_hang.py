"""The watchdog: where processes are, in words; the end of one that stays there; asking one by a signal."""

import re
import signal
import subprocess
import sys
import time

from slm_jax.errors import EXIT_LOST
from slm_jax.multihost.hang import Place, Told, Watchdog, places_text, watched


def name(index: int) -> str:
    return f"process {index} of 9 (host {'abcdefghi'[index]})"


def test_the_place_of_the_fewest_comes_first():
    waiting = {index: Told("'training' of step 122", 1798.4) for index in range(9)}
    text = places_text({**waiting, 4: Told("'data wait' of step 121", 1800.2)}, name)
    first, others = text.split("; ")
    assert first == "process 4 of 9 (host e) is in 'data wait' of step 121 for 1800 s"
    assert others == (
        "process 0 of 9 (host a), process 1 of 9 (host b), process 2 of 9 (host c), process 3 of 9 (host d) "
        "and 4 more are in 'training' of step 122 for 1798 s"
    )


def test_who_tells_nothing_is_named():
    places = {0: Told("'a'", 60.0), 1: Told("'a'", 60.0, 3.0), 2: Told("'b'", 2.0, 58.0)}
    assert places_text(places, name) == (
        "process 2 of 9 (host c) is in 'b' for 2 s (process 2 of 9 (host c) told nothing for 58 s since); "
        "process 0 of 9 (host a) and process 1 of 9 (host b) are in 'a' for 60 s"
    )


def test_a_process_alone_says_where_it_is_and_ends():
    code = """if True:
        import time
        from slm_jax.multihost.hang import Place, watched
        def sleeps_here():
            time.sleep(60)
        with watched(lambda: Place("'data wait' of step 7", 0), 0.6, head="doctor: "):
            sleeps_here()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_LOST, done.stderr
    sentence = r"slm: doctor: no progress for 1 s: this process is in 'data wait' of step 7; the stacks of"
    assert re.match(sentence, done.stderr), done.stderr
    assert "in sleeps_here" in done.stderr


def test_the_interpreter_may_be_held_itself():
    code = """if True:
        import ctypes, time
        from slm_jax.multihost import hang
        hang._SILENT_SECONDS = 0.5
        def holds_it():
            ctypes.PyDLL(None).usleep(2_500_000)
        with hang.watched(lambda: hang.Place("'x'", time.monotonic()), 0.5):
            time.sleep(0.5)
            holds_it()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.startswith("Timeout (0:00:01)!"), done.stderr
    assert "in holds_it" in done.stderr


def test_progress_and_places_without_a_limit_end_nothing(monkeypatch):
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, place, held: ended.append((place.what, held)))
    with watched(lambda: Place("'x'", time.monotonic()), 0.1):
        time.sleep(0.5)
    with watched(lambda: None, 0.1):
        time.sleep(0.5)
    with watched(lambda: Place("'x'", 0), None):
        time.sleep(0.2)
    assert not ended
    with watched(lambda: Place("'y'", 0), 0.1):
        time.sleep(0.5)
    assert ended and ended[0][0] == "'y'" and 0.1 <= ended[0][1] < 0.2


def test_a_process_that_was_stopped_itself_did_not_hang():
    code = """if True:
        import sys, time
        from slm_jax.multihost.hang import Place, watched
        with watched(lambda: Place("'x'", 0), 4.0):
            # The watch looks once, and once more after the stop.
            time.sleep(1.0)
            print("begun", flush=True)
            sys.stdin.readline()
            time.sleep(0.5)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate("\n", timeout=60)
    assert process.returncode == 0 and not err, err
