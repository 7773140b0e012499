"""`rlhf-fast info` tells what runs where."""

import json

from rlhf_fast import info


def test_the_report_names_versions_build_and_every_op(capsys):
    info.main()
    text = capsys.readouterr().out
    for word in ("torch", "CPU", "build", "in use:", "token_logprobs", "native"):
        assert word in text


def test_json_is_the_same_report(capsys):
    info.main(as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["build"]["instruction_set_in_use"] in data["build"]["instruction_sets"]
    assert data["backends"]["token_logprobs"]["cpu"] == {"backend": "native", "why": None}
    cuda = data["backends"]["token_logprobs"]["cuda"]
    assert cuda["why"] or cuda["backend"] == "native"  # a worse backend always says why
