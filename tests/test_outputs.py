"""No output of any command takes the place of an input: the table of tests/stress/outputs.py, in this process."""

import pytest
from conftest import reset_accelerate
from stress import outputs

pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    outputs.prepare(folder)
    return folder


@pytest.mark.parametrize("command", outputs.COMMANDS, ids=lambda command: f"{command.module} {command.line}"[:40])
def test_no_output_takes_the_place_of_an_input(command, inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    before = outputs.contents(inputs)
    tried = [
        attempt
        for attempt in outputs.attempts(command, ("path",))
        if attempt.source in (*command.inputs[:1], *command.inputs[-1:])
    ]
    assert {attempt.option for attempt in tried} == {*command.files, *command.folders}
    for attempt in tried:
        reset_accelerate()
        with pytest.raises(SystemExit) as stop:
            outputs.run(attempt)
        assert stop.value.code == 2
        assert outputs.names_both(capsys.readouterr().err, attempt), attempt
    assert outputs.contents(inputs) == before
