"""How far a stage is, told on a terminal and in a log."""

import io
import sys
import time

import pytest

from cwac_lab.core import progress
from cwac_lab.core.progress import Meter, track, waiting
from cwac_lab.defenses.interface import Defense
from cwac_lab.evaluation.generate import answers
from cwac_lab.training.loop import fit
from cwac_lab.training.settings import TrainerConfig
from support import tiny


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def quick(monkeypatch):
    """Progress that is switched on, and told after moments instead of seconds."""
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(progress, "AFTER", 0.01)
    progress.show()
    yield
    progress.show(False)


@pytest.fixture
def ended(monkeypatch):
    """The meters that have ended."""
    found, end = [], Meter.__exit__
    monkeypatch.setattr(Meter, "__exit__", lambda meter, *rest: (found.append(meter), end(meter, *rest))[1])
    return found


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (600, "10 min"), (5400, "1 h 30 min"), (7260, "2 h 1 min")],
)
def test_a_time_is_told_as_people_say_it(seconds, words):
    assert progress.duration(seconds) == words


@pytest.mark.parametrize(
    ("total", "before", "new", "note", "line"),
    [
        (8, 0, 0, "", "at it: 0 of 8"),
        (8, 0, 2, "", "at it: 2 of 8, about 60 s left"),
        (8, 4, 2, "loss 1.5", "at it: 6 of 8, about 20 s left, loss 1.5"),
        (None, 0, 3, "", "at it: 20 s so far"),
    ],
)
def test_the_time_left_is_that_of_the_steps_so_far(monkeypatch, total, before, new, note, line):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = Meter("at it", total, before)
    now[0] += 20
    meter.advance(new)
    meter.note = note
    assert meter.line() == line


def test_a_log_gets_whole_lines_while_a_stage_goes_on(quick, capsys):
    for _ in track(range(4), "counting"):
        time.sleep(0.05)
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith("- counting: ") and " of 4" in line for line in lines)
    assert "\r" not in told
    assert "s left" in lines[-1]


def test_a_terminal_gets_a_bar_that_goes_away(quick, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with waiting("converting"):
        time.sleep(0.1)
    told = screen.getvalue()
    assert "converting: 0 s so far" in told
    assert told.rstrip().endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize("on", [True, False])
def test_what_is_short_or_switched_off_says_nothing(on, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(progress, "AFTER", 60.0 if on else 0.01)
    progress.show(on)
    for _ in track(range(2), "counting"):
        time.sleep(0.03)
    progress.show(False)
    assert capsys.readouterr().out == ""


def test_a_stage_that_fails_is_told_no_further(quick, capsys):
    def work():
        with Meter("at it", 3):
            time.sleep(0.05)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_answers_are_the_same_and_every_prompt_counts(quick, ended):
    model, chat, prompts = tiny.lively("llama"), tiny.chat(), ["a", "bake bread", "plan a trip", "b", "what is it?"]
    told = answers(model, chat, prompts, 6, batch_size=2)
    progress.show(False)
    assert told == answers(model, chat, prompts, 6, batch_size=2)
    assert [(meter.done, meter.total) for meter in ended] == [(5, 5), (5, 5)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_counts_optimizer_steps_and_tells_the_loss(quick, ended, accumulate):
    chat = tiny.chat()
    examples = [chat.encode(f"Say {i}.", str(i)) for i in range(16)]
    options = TrainerConfig(batch_size=4, learning_rate=1e-3, accumulate=accumulate, epochs=1)
    told = fit(tiny.model(), examples, chat.pad_id, Defense(), options, 0)
    (meter,) = ended
    assert (meter.done, meter.total) == (told["steps"], told["steps"])
    assert meter.note.startswith("loss ")
