"""How a job sets up torch: deterministic, and without what it doesn't need."""

import json
import subprocess
import sys

import numpy as np
import torch
from threadpoolctl import threadpool_info

TRAIN = """
import torch

def train(kind, **settings):
    network = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(network.weight, 0.5)
    torch.nn.init.zeros_(network.bias)
    optimizer = kind(network.parameters(), lr=0.1, **settings)
    for pixel in (1.0, 2.0, 3.0):
        optimizer.zero_grad()
        network(torch.tensor([pixel, -pixel / 2])).square().sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    return [value.tolist() for value in network.parameters()]

def train_all():
    sgd = train(torch.optim.SGD, momentum=0.9, weight_decay=0.01)
    return [sgd, train(torch.optim.Adam), train(torch.optim.Adam, amsgrad=True, betas=(0.5, 0.9))]
"""
JOB = """
import json, sys
from detrojan.learning import determinism
determinism.configure(1)
trained = train_all()
modes = (
    torch.are_deterministic_algorithms_enabled(),
    torch.is_deterministic_algorithms_warn_only_enabled(),
    torch.utils.deterministic.fill_uninitialized_memory,
)
print(json.dumps([trained, modes, sorted(sys.modules)]))
"""


def test_a_job_leaves_out_the_compiler_and_computes_the_same():
    # In a process of its own: what has been loaded stays, and what was changed too.
    done = subprocess.run([sys.executable, "-c", TRAIN + JOB], capture_output=True, text=True, check=True)
    trained, modes, modules = json.loads(done.stdout)
    assert modes == [True, True, False]
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(modules)
    torchs_own = {}
    exec(TRAIN, torchs_own)
    assert trained == torchs_own["train_all"]()


def test_the_tests_themselves_compute_with_one_thread():
    np.linalg.inv(np.eye(2))
    assert {pool["num_threads"] for pool in threadpool_info()} == {1}
    assert torch.get_num_threads() == 1
