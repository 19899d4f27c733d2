"""No defense peeks: what the graph of jobs gives a defense, and what a spy finds in its job."""

import copy
import json
import re

import pyarrow.parquet as pq
import pytest

from detrojan import registry

from .conftest import STUDY, Workshop

FORBIDDEN = ("test", "triggered/", "triggers/", "poisoned/", "held_out", "datasets/")
SPY = '''
"""A defense that looks for test images in all that its job was given."""

import __main__
import copy
import gc
import os
import re
import sys

import torch
from torch import nn

from detrojan.images import DefenderSample
from detrojan.defenses.base import Defense


class Spy(Defense):
    """Search texts for paths."""

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Note all texts that look like a path of images, and the job's own inputs."""
        given = __main__.snakemake
        texts = [repr(vars(part)) + repr(list(part)) for part in (given.input, given.params, given.wildcards)]
        texts += [repr(given.config), repr(sys.argv), repr(dict(os.environ))]
        frame = sys._getframe()
        while frame:
            plain = (str, dict, list)
            texts.append(repr([value for value in frame.f_locals.values() if isinstance(value, plain)]))
            frame = frame.f_back
        texts += [item for item in gc.get_objects() if isinstance(item, str)]
        path = r"[^\\s'\\"]*(?:parquet|safetensors)[^\\s'\\"]*"
        found = set(re.findall(path, " ".join(texts)))
        clean.chosen["found"] = sorted(found)
        clean.chosen["inputs"] = [str(path) for path in given.input]
        clean.chosen["triggered"] = clean.triggered is not None
        return copy.deepcopy(model)
'''


@pytest.fixture(scope="module")
def planned_inputs(tmp_path_factory):
    """The inputs of each planned `defend` job of a study of every method, by defense and attack."""
    workshop = Workshop.make(tmp_path_factory.mktemp("firewall") / "study")
    study = copy.deepcopy(STUDY)
    study["grid"]["attacks"] = ["none", *registry.names("attacks")]
    study["grid"]["ratios"] = [0.05]  # which a clean-label attack can reach
    study["grid"]["defenses"] = ["none", *registry.names("defenses")]
    workshop.write(study)
    output = workshop.snakemake("--dry-run")
    jobs = {}
    for block in re.findall(r"^rule defend:\n((?:    .*\n)+)", output, re.M):
        (inputs,) = re.findall(r"^    input: (.*)$", block, re.M)
        wildcards = dict(pair.split("=") for pair in re.search(r"wildcards: (.*)", block)[1].split(", "))
        jobs[wildcards["defense"], wildcards["attack"]] = inputs.split(", ")
    return jobs


def test_every_method_is_planned(planned_inputs):
    attacks = ["none", *registry.names("attacks")]
    assert set(planned_inputs) == {(d, a) for d in registry.names("defenses") for a in attacks}


@pytest.mark.parametrize("defense", registry.names("defenses"))
def test_a_defense_is_given_what_its_folder_allows(planned_inputs, defense):
    threat_model = registry.threat_model("defenses", defense)
    for attack in ("none", *registry.names("attacks")):
        inputs = planned_inputs[defense, attack]
        assert inputs[0].endswith("model.safetensors")
        samples = [path for path in inputs[1:] if path.startswith("results/samples/")]
        stamped = [path for path in inputs[1:] if path.startswith("results/stamped/")]
        assert len(samples) == (threat_model != "data_free")
        assert len(stamped) == (threat_model == "known_trigger" and attack != "none")
        assert len(inputs) == 1 + len(samples) + len(stamped)
        assert not [path for path in inputs for word in FORBIDDEN if word in path]


def test_a_spy_finds_no_test_image_in_its_job(workshop):
    (workshop.code / "src/detrojan/defenses/clean_data/spy.py").write_text(SPY)
    study = copy.deepcopy(STUDY) | {"keep_defended": True}
    study["grid"]["defenses"] = ["none", "spy"]
    workshop.write(study)
    workshop.snakemake("--until", "defend")
    (runs,) = workshop.folder.glob("results/defended/*/*/badnets/*/*/spy/*/*/*/runs.parquet")
    chosen = json.loads(pq.read_table(runs)["chosen"][0].as_py())
    # The search works: it finds the job's own inputs.
    assert len(chosen["inputs"]) == 2
    assert set(chosen["inputs"]) <= set(chosen["found"])
    assert not chosen["triggered"]
    assert not [text for text in chosen["found"] for word in FORBIDDEN if word in text]
