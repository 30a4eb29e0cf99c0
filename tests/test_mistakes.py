"""Every typical mistake gets one clear sentence and no traceback."""

import pytest
from mistakes import COMMANDS, LIBRARY, command_outcome, sentence_of


@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_mistake_gets_one_sentence(name: str) -> None:
    sentence = sentence_of(LIBRARY[name])
    assert sentence.startswith(("ValueError: ", "TypeError: ", "RuntimeError: "))
    assert "\n" not in sentence
    assert len(sentence) < 400


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_line_mistake_exits_with_2_and_one_line(name: str) -> None:
    status, printed = command_outcome(COMMANDS[name])
    assert status == 2
    assert "Traceback" not in printed
    assert len(printed.splitlines()) == 1
